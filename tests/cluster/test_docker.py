"""The images' recipe, read as text: no engine is needed to see that it keeps its promises."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """(keyword, rest) of every instruction, continuation lines joined, comments dropped."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(keyword, rest) for keyword, _, rest in (line.partition(" ") for line in joined.splitlines())]


def stages() -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for keyword, rest in instructions():
        if keyword == "FROM":
            found[rest.split(" AS ")[1]] = []
        elif found:
            list(found.values())[-1].append((keyword, rest))
    return found


def test_every_image_ends_with_doctor_as_an_unprivileged_user():
    """`megatron-distill doctor` is the last step of each image, and it runs as the image's own user, who is not root."""
    assert set(stages()) == {"server", "trainer"}
    for steps in stages().values():
        assert steps[-1] == ("RUN", "megatron-distill doctor")
        users = [rest for keyword, rest in steps if keyword == "USER"]
        assert users[-1].isdigit() and int(users[-1]) > 0


def test_the_base_and_the_compiled_parts_are_pinned_build_arguments():
    arguments = dict(rest.partition("=")[::2] for keyword, rest in instructions() if keyword == "ARG")
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-[\w.-]+", arguments["CUDA_IMAGE"])
    for name in ("TRANSFORMER_ENGINE_VERSION", "APEX_REF"):
        assert re.fullmatch(r"\d+\.\d+(\.\d+)?", arguments[name])
    installs = [rest for keyword, rest in instructions() if keyword == "RUN" and "pip install" in rest]
    assert all("constraints.txt" in rest or "--no-deps" in rest for rest in installs)


def test_cuda_is_of_the_minor_version_that_torch_was_built_for():
    """Extensions compiled in the image must match torch's CUDA, major and minor."""
    import importlib.metadata

    needed = next(need for need in importlib.metadata.requires("torch") or [] if need.startswith("cuda-toolkit"))
    minor = re.search(r"==(\d+\.\d+)", needed)[1]  # type: ignore[index]
    assert f"ARG CUDA_IMAGE=nvidia/cuda:{minor}." in DOCKERFILE.read_text()


def test_what_the_image_copies_exists_and_passes_the_ignore_file():
    """A path that .dockerignore holds back would fail only in a build."""
    allowed = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().split()
    for keyword, rest in instructions():
        if keyword == "COPY":
            for path in rest.split()[:-1]:
                assert f"!{path}" in allowed
                assert (ROOT / path).exists(), path


def test_hadolint_has_nothing_to_say():
    hadolint = Path(sys.executable).with_name("hadolint")  # of the dev extra
    done = subprocess.run([hadolint, "--no-color", str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
