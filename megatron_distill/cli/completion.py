"""``megatron-distill completion bash|zsh|fish``: what makes the shell complete commands, options, recipes and fields.

    source <(megatron-distill completion bash)          # in ~/.bashrc; zsh likewise
    megatron-distill completion fish | source           # in ~/.config/fish/config.fish

The shell asks this command itself for the words (``completion words ...``), so that they are always those of this version.
"""

import argparse

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
    "fork": "RunConfig",
    "pipeline": "Pipeline",
    "study": "Study",
}
"""The kind of recipe that a command's first word names; the second one's of ``fork``, whose first is a run."""
_TAKE_FIELDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("train", "launch", "plan", "show", "fetch", "fork"), ("",)),
    "eval": ("evaluation.", "data.", "rollouts.", "servers."),
}
"""How the fields begin that may follow."""


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
    else:
        found = _following(command, before[before.index(command) + 1 :], typed)
    return sorted(word for word in found if word.startswith(typed))


def _following(command: str, before: list[str], typed: str) -> list[str]:
    """What can follow the words after a command."""
    parser = argparse.ArgumentParser(prog=command)
    command_module(command).configure(parser)
    sub_commands = next((one.choices for one in parser._actions if isinstance(one.choices, dict)), {})
    if before and before[0] in sub_commands:
        parser, before, sub_commands = sub_commands[before[0]], before[1:], {}
    options = parser._option_string_actions
    if typed.startswith("-"):
        return [name for name in options if name.startswith("--")]
    if before and before[-1] in options and options[before[-1]].nargs != 0:
        return []  # that option's value
    num_named = _num_positional(before, options)
    found = [] if num_named else list(sub_commands)
    if command in _TAKE_RECIPES and num_named == (command == "fork"):
        found += _recipes(_TAKE_RECIPES[command])
    if num_named and command in _TAKE_FIELDS:
        found += [name for name in _fields() if name.startswith(_TAKE_FIELDS[command])]
    return found


def _num_positional(words: list[str], options: dict[str, argparse.Action]) -> int:
    """How many words are neither an option nor its value."""
    values = {number + 1 for number, word in enumerate(words) if word in options and options[word].nargs != 0}
    return sum(number not in values and not word.startswith("-") for number, word in enumerate(words))


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
