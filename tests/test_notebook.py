"""The notebook, run cell by cell in a kernel of its own; and what is committed of it."""

import copy
import json
import os
import re
import shutil
from pathlib import Path

import nbformat
import pytest
import torch
from helpers import ROOT, SCRIPTS
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError


def read_notebook():
    return nbformat.read(ROOT / "train.ipynb", as_version=4)


def copy_project(folder: Path) -> Path:
    """A copy of what a person clones, for the notebook writes into its folder."""
    for file in (*SCRIPTS, "requirements.txt", "train.ipynb"):
        shutil.copy(ROOT / file, folder)
    for part in ("parts", "tests/demo"):
        shutil.copytree(ROOT / part, folder / part)
    return folder


def execute(cells, folder: Path, allow_errors: bool = False, **env: str | None) -> None:
    """Run `cells` one after another in a new kernel in `folder`; each gets its outputs. None removes a variable."""
    env = os.environ | {"NOTEBOOK_DEMO": "True"} | env
    for number, cell in enumerate(cells):
        cell["id"] = f"run-{number}"  # the same cell may run twice
    client = NotebookClient(
        nbformat.v4.new_notebook(cells=cells, metadata=read_notebook().metadata),
        timeout=300,  # seconds, each cell
        kernel_name="python3",
        allow_errors=allow_errors,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env={name: value for name, value in env.items() if value is not None})


def code_cells() -> list:
    return [cell for cell in read_notebook().cells if cell.cell_type == "code"]


def find(cells, part: str):
    [cell] = [cell for cell in cells if part in cell.source]
    return cell


def shown(cell) -> str:
    """All text that a cell shows."""
    outputs = (output.get("text") or output.get("data", {}).get("text/html", "") for output in cell.outputs)
    return "".join(outputs)


def error(cell) -> str:
    """What the error of a cell says."""
    return "".join(output["evalue"] for output in cell.outputs if output.output_type == "error")


def has_picture(cell) -> bool:
    return any("image/png" in output.get("data", {}) for output in cell.outputs)


def check_outputs(cells) -> None:
    """What the demo must show: what it will do, data, lengths, tokens, curves and replies."""
    assert "将运行演示" in shown(find(cells, "environment.describe_card"))
    assert "train.jsonl：108 行" in shown(find(cells, "data.prepare("))
    row = shown(find(cells, "example = data.read_examples(TRAIN_FILE)"))
    assert "【question】" in row and "【answer】" in row
    assert has_picture(find(cells, "axes.hist(")) and has_picture(find(cells, "model_card.plot_losses("))
    prompt, learned = shown(find(cells, "def show_tokens")).split("要学会写的，计损失")
    assert "color: gray" in prompt and "&lt;|im_start|&gt;user" in prompt and "&lt;think&gt;" not in prompt
    assert re.search(r">&lt;think&gt;</span>.*>&lt;/think&gt;</span>.*>&lt;\|im_end\|&gt;</span></p>$", learned)
    before, after = shown(find(cells, "def show_reply")), shown(find(cells, "weights.load_trained"))
    assert "不能代替医生的诊断" in before and "（没有训练过的问法）" in after
    thinking, answer = re.search(r"<summary>思考</summary>(.+?)</details><p><b>答</b>　(.+?)</p>", after).groups()
    assert "碳水化合物" in thinking + answer and "医生" in answer and "没有说完" not in answer
    assert "（训练过的问题）" in shown(find(cells, "show_reply(trained_model, TRAINED"))
    assert not re.search("Warning|Traceback|Error", "".join(map(shown, cells)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, list, list, list]:
    """(folder, the cells of a first run, of a second one, of one with LoRA): in one kernel, in this order."""
    folder = copy_project(tmp_path_factory.mktemp("project"))
    first, second, lora = code_cells(), code_cells(), code_cells()
    for cell in lora:
        cell.source = cell.source.replace("LORA = False", "LORA = True").replace('"max_steps": 300', '"max_steps": 4')
    execute([*first, *second, *lora], folder)
    return folder, first, second, lora


def test_every_cell_runs(runs):
    folder, cells, *_ = runs
    check_outputs(cells)
    training = shown(find(cells, "train.train(args"))
    assert "<th>验证损失</th>" in training and training.count("合计（估算）") == 1
    assert not list(folder.glob("*.jsonl"))  # the demo leaves the real data's files alone


def test_run_again_it_loads_the_finished_model(runs):
    *_, cells, _ = runs
    assert "output/notebook/full 里已有训练完的模型" in shown(find(cells, "train.train(args"))
    check_outputs(cells)


def test_lora_by_one_variable(runs):
    folder, *_, cells = runs
    assert "trainable params" in shown(find(cells, "train.train(args"))
    assert (folder / "output" / "notebook" / "lora" / "adapter_model.safetensors").is_file()
    assert "<b>答</b>" in shown(find(cells, "weights.load_trained"))


def test_wrong_folder(tmp_path):
    with pytest.raises(CellExecutionError, match="这里不是完整的项目文件夹；请先 git clone"):
        execute(code_cells()[:1], tmp_path)


def test_mistakes_get_a_sentence(tmp_path):
    """In one kernel: no key, no data, no finished training, no GPU."""
    folder = copy_project(tmp_path)
    cells = code_cells()
    training, key, prepare = (find(cells, part) for part in ("train.train(args", "getpass(", "data.prepare("))
    gpu, no_data = copy.deepcopy(cells[2]), copy.deepcopy(prepare)

    def line(source: str):
        return nbformat.v4.new_code_cell(source)

    after = [cell for cell in cells[3:] if cell not in (training, key)]
    execute(
        [
            *cells[:3],
            *(line("DEMO = False"), key, gpu, line("DEMO = True")),
            line('samples = Path(DATASET).read_bytes(); Path(DATASET).write_text("")'),
            no_data,
            line("Path(DATASET).write_bytes(samples)"),
            *after,
        ],
        folder,
        allow_errors=True,
        SWANLAB_MODE=None,
        SWANLAB_SAVE_DIR=str(folder),
    )
    assert "没有 SwanLab API key，只记录在本地" in shown(key)  # nobody can be asked here
    assert "tests/demo/medical.jsonl 是空文件" in error(no_data)
    assert "还没有训练完；请先运行上面训练的那一格" in error(find(cells, "model_card.plot_losses("))
    assert "还没有训练完；请先运行上面训练的那一格" in error(find(cells, "weights.load_trained"))
    if not torch.accelerator.is_available():
        assert "没有找到 GPU；请把上一格改成 DEMO = True" in error(gpu)
    failed = [cell for cell in after if error(cell)]
    assert len(failed) == 3  # with the one that asks the model that is not there once more


def test_committed_outputs_are_those_of_a_good_run_on_no_machine_in_particular():
    """Every code cell was run in order; no error, no path, no key."""
    cells = code_cells()
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    check_outputs(cells)
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    text = json.dumps(
        [[cell.source, [o for o in cell.outputs if "image/png" not in o.get("data", {})]] for cell in cells]
    )
    assert not re.search(r"/(work|tmp|root|home|Users)\b|[A-Z]:\\\\|site-packages", text)
    assert not re.search(r"api_key\s*=\s*['\"]", text)
    assert (ROOT / "train.ipynb").stat().st_size < 300_000
