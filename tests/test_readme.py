"""The READMEs: every command, flag, file and link in them exists, the two of the top level say the same and stay short,
and each promise in tests/README.md has its test."""

import contextlib
import importlib.util
import io
import json
import re
import shlex
import sys

import pytest
import swanlab.cli
import torch.distributed.run
from helpers import ROOT, SCRIPTS

import data
from parts.terminal import first_line

READMES = ("README.md", "README_EN.md")
NOTES = ("parts/README.md", "tests/README.md", "tests/benchmarks/README.md")
# Flags that their `serve` or `eval` has in the documentation of vLLM, SGLang 0.5.23 and EvalScope 1.14.1, which are
# not installed here; tests/test_serving.py starts that of transformers.
ELSEWHERE = {
    "transformers": "serve --port",
    "vllm": "serve --reasoning-parser --host --port",
    "sglang": "serve --model-path --reasoning-parser --host --port",
    "evalscope": "eval --model --model-args --api-url --datasets --dataset-args --generation-config --judge-model-args "
    "--work-dir",
}
# What other tests run as it stands here, or what the line before it makes.
AS_THEY_STAND = (
    "llama-quantize|llama-quantize model-bf16.gguf model.gguf Q4_K_M|ollama (create|run)( qwen3-medical)?|"
    "modelscope (create|upload|login)( .*)?|tar -xzf llama_cpp_python-0.3.36.tar.gz|cd output/qwen3-medical|"
    "python llama_cpp_python-0.3.36/.*/convert_hf_to_gguf.py .*|source ~/evalscope/bin/activate|ruff (check|format) .|"
    "git clone URL qwen3-medical|cd qwen3-medical"
)
PROGRAMS = {"python", "pip", "pytest", "torchrun", "swanlab", "jupyter", "curl", "bash", "git"}
PROGRAMS |= {"ruff", "llama-quantize", "ollama", "modelscope", *ELSEWHERE}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def code_blocks(text: str) -> list[tuple[str, list[str]]]:
    """(language, lines without comments and indent) of each fenced block."""
    blocks = []
    for language, body in re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE):
        blocks.append((language, [re.sub(r"\s+# .*", "", line).strip() for line in body.splitlines()]))
    return blocks


def sentences(text: str) -> str:
    """The text without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)


def inline_codes(text: str) -> list[str]:
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", sentences(text))]


def commands(text: str) -> list[str]:
    """What a person is to type, in code blocks and inside sentences."""
    lines = [line for language, body in code_blocks(text) if language == "bash" for line in body if line]
    lines += [code for code in inline_codes(text) if " " in code and code.split()[0] in PROGRAMS]
    return [re.sub(r"^([A-Z_]+=\S+ )+", "", line) for line in lines]  # without variables of its environment


def loose_flags(text: str) -> list[str]:
    """Flags in sentences, without their command, perhaps with a value."""
    return [code for code in inline_codes(text) if code.startswith("--")]


def places(text: str) -> list[str]:
    """Links, the files and folders that tables begin with, and the tests of promises, file::test."""
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("https://")]
    files = re.findall(r"^\| ([\w/]+(?:\.\w+|/)) \|", text, re.MULTILINE)
    return links + files + re.findall(r"\| (tests/[\w/]+\.py::\w+) \|", text)


def accept_place(place: str) -> None:
    """Raises AssertionError where there is no such file, or no such test in it."""
    file, _, test = place.partition("::")
    assert (ROOT / file).exists() and (not test or f"\ndef {test}(" in read(file))


def flags_of(script: str, *words: str) -> set[str]:
    """The flags that the script's --help shows, once it has taken the words before it. Raises AssertionError where it
    does not take their values."""
    main = importlib.import_module(script.removesuffix(".py")).main
    page = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(page), contextlib.redirect_stderr(page):
        patch.setattr(sys, "argv", [script, *words, "--help"])
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 0, page.getvalue()
    return set(re.findall(r"^ +(?:-h, )?(--\w+)", page.getvalue(), re.MULTILINE))


def accept(script: str, words: list[str]) -> None:
    """Raises AssertionError or OSError unless there is such a script with these flags and values."""
    flags = {word for word in words if word.startswith("--")}
    known = flags_of(script, *words) if script in SCRIPTS else set(re.findall(r'"(--\w+)"', read(script)))
    assert flags <= known, flags - known


def accept_command(command: str) -> None:
    """Raises where there is no such command."""
    program, *words = shlex.split(command)
    flags = {word for word in words if word.startswith("--")}
    if re.fullmatch(AS_THEY_STAND, command):
        return
    if command.startswith("python -m"):
        assert importlib.util.find_spec(words[1])
    elif program == "python":
        accept(words[0], words[1:])
    elif program == "torchrun":
        args = torch.distributed.run.get_args_parser().parse_args(words)
        accept(args.training_script, args.training_script_args)
    elif program == "swanlab":
        assert words[0] in swanlab.cli.cli.commands
    elif program == "pip":
        assert words[0] in ("install", "download")
        assert all((ROOT / file).is_file() for flag, file in zip(words, words[1:]) if flag == "-r")
    elif program in ("jupyter", "bash"):
        assert (ROOT / words[-1]).is_file()
    elif program in ELSEWHERE:
        assert {words[0], *flags} <= set(ELSEWHERE[program].split())
        assert "127.0.0.1" in command or program in ("evalscope", "transformers")  # vLLM would listen to everybody
        assert all((ROOT / file).is_file() for file in re.findall(r'"local_path": "([^"]+)"', command))
    elif program == "curl":
        [user] = json.loads(words[-1])["messages"]  # the system prompt is in the model's chat template
        assert user == data.to_messages(user["content"])[-1]
    else:
        assert program == "pytest"
        assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
        assert "-m" not in words or f'"{words[words.index("-m") + 1]}: ' in read("pyproject.toml")


def accept_flag(text: str) -> None:
    """Raises where neither a script nor torchrun has such a flag; one alone is named without its value."""
    for script in SCRIPTS:
        if text in flags_of(script):
            return
        with contextlib.suppress(AssertionError):
            return accept(script, shlex.split(text))
    torch.distributed.run.get_args_parser().parse_args([*shlex.split(text), "train.py"])


def failing(kind, check, *files: str) -> list[str]:
    """Those of these files that `check` does not take."""
    wrong = []
    for one in sorted({one for file in files for one in kind(read(file))}):
        try:
            check(one)
        except (SystemExit, AssertionError, OSError, ValueError) as error:
            wrong.append(f"{one}: {type(error).__name__} {first_line(error)}")
    return wrong


def test_every_command_flag_link_file_and_test_exists():
    wrong = failing(commands, accept_command, *READMES, *NOTES)
    wrong += failing(loose_flags, accept_flag, *READMES) + failing(places, accept_place, *READMES, "tests/README.md")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("command", ["train.py --lerning_rate 1", "train.py --seed x", "data.py --data x", "no.py"])
def test_what_does_not_exist_is_found_out(command):
    with pytest.raises((SystemExit, AssertionError, OSError)):
        accept_command(f"python {command}")


def test_both_are_short_and_have_the_same_headings_commands_and_pictures():
    chinese, english = map(read, READMES)
    assert max(chinese.count("\n"), english.count("\n")) <= 250
    assert max(len(chinese.encode()), len(english.encode())) <= 24_000
    levels = [re.findall(r"^(#+) ", sentences(text), re.MULTILINE) for text in (chinese, english)]
    assert levels[0] == levels[1] and code_blocks(chinese) == code_blocks(english)
    assert {*SCRIPTS, "train.ipynb"} <= set(places(chinese))
    for kind in (commands, loose_flags, places):
        assert set(kind(chinese)) ^ set(kind(english)) <= set(READMES)
    pictures = {path for path in places(chinese) if path.startswith("readme_images/")}
    assert pictures == {str(path.relative_to(ROOT)) for path in (ROOT / "readme_images").iterdir()}
