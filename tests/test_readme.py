"""The READMEs: every command, flag, file and link in them exists, and both say the same."""

import importlib.util
import inspect
import json
import re
import shlex
import sys

import pytest
import swanlab.cli
import torch.distributed.run
import transformers
from accelerate.commands.launch import launch_command_parser
from helpers import ROOT
from transformers.cli.serve import Serve

import data
import inference
import inference_lora
import train
import train_lora
from parts.model import export as modelfile

READMES = ("README.md", "README_EN.md")
TRAINING = {"train.py": train.TrainArguments, "train_lora.py": train_lora.LoraArguments}
OTHERS = {"data.py": data, "inference.py": inference, "inference_lora.py": inference_lora}
COMMANDS = ("python", "pip", "pytest", "torchrun", "accelerate", "swanlab", "jupyter")
COMMANDS += ("transformers", "evalscope", "curl", "ruff", "bash", "llama-quantize", "ollama", "modelscope")
# Not installed here: flags that their `serve` has in vLLM's documentation, in SGLang 0.5.23 and in Open WebUI 0.12.4.
ENGINES = {
    "vllm": {"--reasoning-parser", "--host", "--port"},
    "sglang": {"--model-path", "--reasoning-parser", "--host", "--port"},
    "open-webui": {"--host", "--port"},
}
COMMANDS += tuple(ENGINES)
EVALSCOPE_FLAGS = {"--model", "--model-args", "--api-url", "--datasets", "--dataset-args", "--generation-config"}
EVALSCOPE_FLAGS |= {"--work-dir"}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def code_blocks(text: str) -> list[tuple[str, list[str]]]:
    """(language, lines without comments and indent) of each fenced block."""
    blocks = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
    return [
        (language, [re.sub(r"\s+# .*", "", line).strip() for line in body.splitlines()]) for language, body in blocks
    ]


def inline_codes(text: str) -> list[str]:
    text = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


def commands(text: str) -> list[str]:
    """What a person is to type, in code blocks and inside sentences."""
    lines = [line for language, body in code_blocks(text) if language == "bash" for line in body if line]
    return lines + [code for code in inline_codes(text) if code.split()[0] in COMMANDS and code != "pytest"]


def loose_flags(text: str) -> list[str]:
    """Flags in sentences, without their command, each with its value."""
    return [code for code in inline_codes(text) if code.startswith("--")]


def headings(text: str) -> list[int]:
    """The levels of the headings, in order."""
    text = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return [len(marks) for marks in re.findall(r"^(#+) ", text, re.MULTILINE)]


@pytest.fixture
def help_flags(monkeypatch, capsys):
    """The flags that a script's --help shows, from its own parser, in this process."""

    def flags(script: str) -> set[str]:
        monkeypatch.setattr(sys, "argv", [script, "--help"])
        with pytest.raises(SystemExit):
            OTHERS[script].main()
        return set(re.findall(r"^ +(--?\w+)", capsys.readouterr().out, re.MULTILINE))

    return flags


def training_parser(script: str):
    return transformers.HfArgumentParser(TRAINING[script], allow_abbrev=False)


def accept(script: str, flags: list[str], help_flags) -> None:
    """Raises SystemExit, ValueError or AssertionError unless `script` takes `flags`."""
    if script in TRAINING:
        values = training_parser(script).parse_args(flags)
        # --fsdp wants several processes, as test_fsdp.py has them
        TRAINING[script](**vars(values) | {"report_to": "none", "fsdp": False})
    elif script in OTHERS:
        found = {word for word in flags if word.startswith("--")}
        assert found <= help_flags(script) | {"--help"}, (script, found)
        if script == "inference.py":
            inference.build_parser("", data.OUTPUT_DIR).parse_args(flags)
    else:
        assert (ROOT / script).is_file(), script
        text = (ROOT / script).read_text(encoding="utf-8")
        assert all(f'"{flag}"' in text for flag in flags), (script, flags)


def each(find):
    return pytest.mark.parametrize("found", sorted({item for name in READMES for item in find(read(name))}))


@each(commands)
def test_command_exists(found, help_flags, workspace):
    program, *words = shlex.split(found)
    if program == "python" and words[0] == "-m":
        assert importlib.util.find_spec(words[1])
    elif program == "python" and words[0].endswith("convert_hf_to_gguf.py"):  # tests/test_serving.py runs it
        assert words[0].startswith("llama_cpp_python-0.3.36/") and words[1] == data.OUTPUT_DIR
        assert words[2:] == ["--outfile", f"{data.OUTPUT_DIR}/model-bf16.gguf"]
    elif program == "python":
        accept(words[0], [word for word in words[1:] if word != "--help"], help_flags)
    elif program == "torchrun":
        args = torch.distributed.run.get_args_parser().parse_args(words)
        accept(args.training_script, args.training_script_args, help_flags)
    elif program == "accelerate":
        args = launch_command_parser().parse_args(words[1:])
        accept(args.training_script, args.training_script_args, help_flags)
    elif program == "swanlab":
        assert words[0] in swanlab.cli.cli.commands
    elif program == "pip":
        files = [file for flag, file in zip(words, words[1:]) if flag == "-r"]
        assert words[0] in ("install", "download") and all((ROOT / file).is_file() for file in files)
    elif program == "tar":  # what the line before downloads
        assert words == ["-xzf", "llama_cpp_python-0.3.36.tar.gz"] and "llama-cpp-python==0.3.36 " in read("README.md")
    elif program == "cd":
        assert words == [data.OUTPUT_DIR]
    elif program == "llama-quantize":  # not installed here, nor is the next
        assert words in ([], ["model-bf16.gguf", modelfile.WEIGHTS, "Q4_K_M"])
    elif program == "ollama":
        assert words[0] in ("create", "run") and words[1:] in ([], ["qwen3-medical"])
    elif program == "modelscope":  # tests/test_hub.py runs the first two
        assert words[0] in ("create", "upload", "login")
    elif program in ("jupyter", "bash"):
        assert (ROOT / words[-1]).is_file()
    elif program == "transformers":
        known = inspect.signature(Serve.__init__).parameters
        flags = {word[2:].replace("-", "_") for word in words if word.startswith("--")}
        assert words[0] == "serve" and flags <= set(known)
    elif program in ENGINES:
        assert words[0] == "serve" and {word for word in words if word.startswith("--")} <= ENGINES[program]
        assert "127.0.0.1" in words  # Open WebUI and vLLM would listen to everybody
    elif program == "evalscope":  # not installed here either; tests/test_exam.py runs it where it is
        assert words[0] == "eval" and {word for word in words if word.startswith("--")} <= EVALSCOPE_FLAGS
        sets = json.loads(words[words.index("--dataset-args") + 1])
        assert words[words.index("--datasets") + 1 : words.index("--dataset-args")] == list(sets)
        assert all((ROOT / one["local_path"]).is_file() for one in sets.values() if "local_path" in one)
    elif program == "source":  # of the environment that the line before makes
        assert f"python -m venv {words[0].removesuffix('/bin/activate')}" in read("README.md")
    elif program == "curl":
        [user] = json.loads(words[-1])["messages"]  # the system prompt is in the model's chat template
        assert user == data.to_messages(user["content"])[-1]
    elif program == "ruff":
        assert words[0] in ("check", "format")
    else:
        assert program == "pytest" and (not words or words[0] == "-m" and f'"{words[1]}: ' in read("pyproject.toml"))


@each(loose_flags)
def test_flag_exists(found, help_flags):
    """In some script, with the value that it is shown with."""

    def accepted(script: str) -> bool:
        known = set(training_parser(script)._option_string_actions) if script in TRAINING else help_flags(script)
        if " " not in found:
            return found in known
        try:
            return accept(script, shlex.split(found), help_flags) is None
        except (SystemExit, AssertionError):
            return False

    if not any(accepted(script) for script in (*TRAINING, *OTHERS)):
        torch.distributed.run.get_args_parser().parse_args([*shlex.split(found), "train.py"])


@pytest.mark.parametrize(
    "command", ["train.py --lerning_rate 1", "data.py --data x", "inference.py --thinking", "no.py"]
)
def test_what_does_not_exist_is_found_out(command, help_flags):
    script, *flags = command.split()
    with pytest.raises((SystemExit, AssertionError)):
        accept(script, flags, help_flags)


@pytest.mark.parametrize("name", READMES)
def test_links_and_files_hold(name):
    text = read(name)
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links and not [link for link in links if not link.startswith("https://") and not (ROOT / link).exists()]
    files = [cells.split("|")[1].strip().strip("`") for cells in re.findall(r"^\| [^-].*$", text, re.MULTILINE)]
    files = [file for file in files if re.fullmatch(r"[\w/]+(\.\w+|/)", file)]
    assert set(TRAINING) | set(OTHERS) | {"train.ipynb"} <= set(files)
    assert not [file for file in files if not (ROOT / file).exists()]


@pytest.mark.parametrize("name", READMES)
def test_each_promise_names_a_test_that_exists(name):
    promises = re.findall(r"\| (tests/\w+\.py)::(\w+) \|", read(name))
    assert len(promises) > 10
    for file, test in promises:
        assert f"\ndef {test}(" in (ROOT / file).read_text(encoding="utf-8"), test


def test_both_have_the_same_headings_commands_and_pictures():
    chinese, english = map(read, READMES)
    assert headings(chinese) == headings(english) and headings(chinese)[0] == 1
    assert code_blocks(chinese) == code_blocks(english) != []
    assert sorted(commands(chinese)) == sorted(commands(english))
    assert sorted(loose_flags(chinese)) == sorted(loose_flags(english))
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", chinese)
    assert pictures == re.findall(r"!\[[^]]*\]\(([^)]+)\)", english)
    assert set(pictures) == {str(path.relative_to(ROOT)) for path in (ROOT / "readme_images").iterdir()}
