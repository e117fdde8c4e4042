"""The images' recipe, read as text: no engine is needed to see that it keeps its promises."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
MAKEFILE = ROOT / "Makefile"


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


def test_every_image_ends_with_doctor_as_an_unprivileged_user() -> None:
    """`megatron-distill doctor` is the last step of each image, and it runs as the image's own user, who is not root."""
    assert set(stages()) == {"server", "trainer"}
    for steps in stages().values():
        assert steps[-1] == ("RUN", "megatron-distill doctor")
        users = [rest for keyword, rest in steps if keyword == "USER"]
        assert users[-1].isdigit() and int(users[-1]) > 0


def test_images_are_left_in_a_folder_that_hides_nothing() -> None:
    """``python -m megatron_distill`` beside the sources would import those, which have no recipes among them."""
    sources = [rest.split()[-1] for keyword, rest in instructions() if keyword == "COPY"]
    assert "megatron_distill" in sources  # into the WORKDIR of then
    for steps in stages().values():
        assert [rest for keyword, rest in steps if keyword == "WORKDIR"][-1] == "/home/distill"


def test_the_base_is_pinned_and_pip_installs_what_the_constraints_say() -> None:
    """The image holds the versions of constraints.txt, Transformer Engine's wheel for torch's own CUDA among them."""
    arguments = dict(rest.partition("=")[::2] for keyword, rest in instructions() if keyword == "ARG")
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-[\w.-]+", arguments["CUDA_IMAGE"])
    installs = [rest for keyword, rest in instructions() if keyword == "RUN" and "pip install" in rest]
    assert all("constraints.txt" in rest or "--no-deps" in rest for rest in installs)
    assert not re.search(r"pip install[^&]*==", " ".join(installs)), "a second place for a version"
    core = re.search(r'"transformer-engine\[(core_cu\d+),pytorch\]"', " ".join(installs))
    assert core and core[1] == f"core_cu{arguments['CUDA_IMAGE'].removeprefix('nvidia/cuda:').split('.')[0]}"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (extra,) = extras["gpu"]
    (setup,) = re.findall(r"--no-build-isolation .*?'(transformer-engine\[\S+\])'", MAKEFILE.read_text(), re.DOTALL)
    assert f'"{setup}"' in " ".join(installs)  # a host without the image gets the same
    assert core[1] in extra and pins()["transformer-engine"] in SpecifierSet(re.sub(r"^[^]]*\]", "", extra))


@pytest.mark.slow
def test_constraints_are_the_whole_environment_and_nothing_else() -> None:
    """What a run and its launcher need, directly or not, is pinned, at the version that is installed here; no addresses."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!]+", line) for line in lines)
    installed = {canonicalize_name(one.name): one.version for one in importlib.metadata.distributions()}
    assert {name: pin for name, pin in pins().items() if installed.get(name, pin) != pin} == {}
    wanted, seen = [Requirement("megatron-distill[launch]")], set()
    while wanted:
        need = wanted.pop()
        for line in importlib.metadata.requires(need.name) or []:
            inner = Requirement(line)
            name = canonicalize_name(inner.name)
            extras = ["", *need.extras]
            applies = not inner.marker or any(inner.marker.evaluate({"extra": extra}) for extra in extras)
            if applies and (name, frozenset(inner.extras)) not in seen and name in installed:
                seen.add((name, frozenset(inner.extras)))
                wanted.append(inner)
    assert {name for name, _ in seen} - set(pins()) == set()


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {
        canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines if "==" in line and line[0] != "#"
    }


def test_transformer_engine_is_compiled_against_what_torch_brings() -> None:
    """Without isolation, so that it is this torch; with the headers of torch's own packages, since nvcc is one of them and its
    folder has no cuDNN; and with no second cuDNN in the base, which Transformer Engine would load beside torch's."""
    for text in (DOCKERFILE.read_text(), MAKEFILE.read_text()):
        assert re.search(r"NVTE_BUILD_USE_NVIDIA_WHEELS=1[^&]*--no-build-isolation", text)
    installed = importlib.metadata.files("nvidia-cudnn-cu13") or []
    assert any(path.name == "cudnn.h" for path in installed)
    (base,) = re.findall(r"ARG CUDA_IMAGE=(\S+)", DOCKERFILE.read_text())
    assert "cudnn" not in base and "-devel-" in base


def test_cuda_is_of_the_minor_version_that_torch_was_built_for() -> None:
    """Extensions compiled in the image must match torch's CUDA, major and minor."""
    needed = next(need for need in importlib.metadata.requires("torch") or [] if need.startswith("cuda-toolkit"))
    minor = re.search(r"==(\d+\.\d+)", needed)[1]  # type: ignore[index]
    assert f"ARG CUDA_IMAGE=nvidia/cuda:{minor}." in DOCKERFILE.read_text()


def test_the_package_is_built_from_all_of_its_sources() -> None:
    """pyproject.toml names every package's folder, and none may be missing when pip builds it; the dependencies, which take
    the time, lie in a layer before the code."""
    steps = [f"{keyword} {rest}" for keyword, rest in stages()["server"]]
    (built,) = (number for number, step in enumerate(steps) if re.search(r"pip install[^&]* \.( |$)", step))
    copied = [steps.index(f"COPY {folder} {folder}") for folder in ("megatron_distill", "recipes")]
    (listed,) = (number for number, step in enumerate(steps) if "['project']['dependencies']" in step)
    assert listed < min(copied) and max(copied) < built


def test_what_the_image_copies_exists_and_passes_the_ignore_file() -> None:
    """A path that .dockerignore holds back would fail only in a build."""
    allowed = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().split()
    for keyword, rest in instructions():
        if keyword == "COPY":
            for path in rest.replace("--chown=1001 ", "").split()[:-1]:
                assert f"!{path}" in allowed
                assert (ROOT / path).exists(), path


def test_hadolint_has_nothing_to_say() -> None:
    """The linter's rules hold, warnings included."""
    hadolint = Path(sys.executable).with_name("hadolint")  # of the dev extra
    done = subprocess.run([hadolint, "--no-color", str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
