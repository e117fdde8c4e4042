"""``megatron-distill completion bash|zsh|fish``: what makes the shell complete commands, options, recipes and fields.

    source <(megatron-distill completion bash)          # in ~/.bashrc; zsh likewise
    megatron-distill completion fish | source           # in ~/.config/fish/config.fish

The shell asks this command itself for the words (``completion words ...``), so that they are always those of this version.
"""

import argparse
import re

from megatron_distill.cli.main import COMMANDS, command_module

_BASH = """_megatron_distill() {
    local IFS=$'\\n' word="${COMP_LINE:0:COMP_POINT}"
    word="${word##* }"
    COMPREPLY=($(megatron-distill completion words "${COMP_LINE:0:COMP_POINT}" 2>/dev/null))
    [[ "$word" == *=* ]] && COMPREPLY=("${COMPREPLY[@]#"${word%=*}="}")
    [[ ${#COMPREPLY[@]} == 1 && "${COMPREPLY[0]}" == *= ]] && compopt -o nospace
}
complete -o default -F _megatron_distill megatron-distill
"""
SCRIPTS = {
    "bash": _BASH,
    "zsh": """_megatron_distill() {
    local -a words_found
    words_found=(${(f)"$(megatron-distill completion words "${(j: :)words[1,CURRENT]}" 2>/dev/null)"})
    compadd -S '' -a words_found || _files
}
compdef _megatron_distill megatron-distill
""",
    "fish": """complete -c megatron-distill -f -a '(megatron-distill completion words (commandline -cp) 2>/dev/null)'
complete -c megatron-distill -F -n 'test (count (commandline -opc)) -ge 2'
""",
}
_TAKE_RECIPES = {
    "train": "RunConfig",
    "launch": "RunConfig",
    "plan": "RunConfig",
    "show": "RunConfig",
    "fetch": "RunConfig",
    "pipeline": "Pipeline",
    "study": "Study",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    lines = __doc__.split("\n\n", 2)[1]
    parser.description = f"Print what makes the shell complete commands, options, recipes and fields.\n\n{lines}"
    parser.add_argument("shell", choices=[*SCRIPTS, "words"], help="your shell (words: what the shell asks for)")
    parser.add_argument("line", nargs="?", default="", help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> None:
    """Print the script, or the words that can follow."""
    if options.shell == "words":
        print("\n".join(words(options.line)))
    else:
        print(SCRIPTS[options.shell], end="")


def words(line: str) -> list[str]:
    """What the last word of a command line can become; files are the shell's own business.

    Args:
        line: up to the cursor, the program's name first.
    """
    *before, typed = line.split(" ") if line else ["", ""]
    before = [word for word in before if word][1:]
    command = next((word for word in before if word in COMMANDS), None)
    if command is None:
        found = ["--help", "--version"] if typed.startswith("-") else list(COMMANDS)
    elif typed.startswith("-"):
        found = _options(command)
    elif command in _TAKE_RECIPES and len(before) == 1:
        found = _recipes(_TAKE_RECIPES[command])
    elif _TAKE_RECIPES.get(command) == "RunConfig":
        found = _fields()
    else:
        found = []
    return sorted(word for word in found if word.startswith(typed))


def _options(command: str) -> list[str]:
    """As the command's own help has them."""
    parser = argparse.ArgumentParser(prog=command)
    command_module(command).configure(parser)
    return sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", parser.format_usage())) | {"--help"})


def _recipes(kind: str) -> list[str]:
    from megatron_distill.config import RunConfig
    from megatron_distill.config.loading import every

    if kind == "Pipeline":
        from megatron_distill.launch.pipeline import Pipeline

        return list(every(Pipeline))
    if kind == "Study":
        from megatron_distill.study.run import Study

        return list(every(Study))
    return list(every(RunConfig))


def _fields() -> list[str]:
    from megatron_distill.config import all_fields

    return [f"{name}=" for name in all_fields()]
