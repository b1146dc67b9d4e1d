"""Exports of real runs, confirmed by open_clip itself; and what must make the confirmation fail."""

from __future__ import annotations

import gzip
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import RunCli
from safetensors.torch import load_file, save_file

import evaluate
import export
from cmpt.engine.opened import open_model
from cmpt.models.open_clip_format import FormatError, to_open_clip
from cmpt.train import checked_recipe
from verify_export import verify_export

TINY = [
    "model.vision.layers=1",
    "model.text.layers=1",
    "engine.batch_size=16",
    "run.stop_after=2 steps",
    "run.log_every=1 steps",
    "optimizer.warmup=1 steps",
    "evaluation.every=null",
    "run.duration=2 steps",
]
TORCHRUN = ["torchrun", "--standalone", "--nproc-per-node", "2"]  # imports less than DeepSpeed's launcher
# Between them: weights whole and in pieces on a rank, both tokenizers, every option that changes the architecture.
RUNS = {
    "zero1_sentencepiece": ["engine.zero_stage=1"],
    "clip_bpe": [
        "tokenizer.kind=clip_bpe",
        "tokenizer.path=null",
        "model.context_length=77",
        "model.quick_gelu=true",
        "model.vision.pooling=average",
        "model.text.pooling=argmax",
        "model.vision.mlp_ratio=2.5",
    ],
    "zero3_options": [
        "engine.zero_stage=3",
        "loss.kind=sigmoid",
        "model.logit_bias_init=-10.0",
        "model.temperature_init=0.1",
        "model.vision.layer_scale_init=0.1",
        "model.text.layer_scale_init=0.1",
        "model.vision.layer_norm_eps=1e-6",
        "model.text.layer_norm_eps=1e-6",
        "model.vision.heads=6",
        "image.size=64",
    ],
}
Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory, run_cli: RunCli) -> Iterator[Folder]:
    """The run folder of one of RUNS, trained at its first use; where it names a ZeRO stage by two processes."""
    root = tmp_path_factory.mktemp("runs")

    def run_folder(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            launcher = TORCHRUN if name.startswith("zero") else ["python"]
            command = [*launcher, "cmpt/train.py", "recipes/quickstart.yaml"]
            overrides = [*TINY, *RUNS[name], f"run.folder={root}", f"run.name={name}"]
            done = run_cli([*command, *overrides], env={"OMP_NUM_THREADS": "1"})
            assert done.returncode == 0, done.stderr
        return folder

    yield run_folder


@pytest.fixture(scope="module")
def exported(run_of: Folder, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    root = tmp_path_factory.mktemp("exported")

    def exported_folder(name: str) -> Path:
        if not (root / name).exists():
            assert export.main([str(run_of(name)), str(root / name)]) == 0
        return root / name

    return exported_folder


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("half", [False, True])
def test_open_clip_confirms_the_export(
    name: str, half: bool, run_of: Folder, tmp_path: Path, open_clip: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """Token ids of 1,000 captions, features, logits, ranking (invariant 6)."""
    out = tmp_path / "out"
    assert export.main([str(run_of(name)), str(out), "--verify", *(["--half"] if half else [])]) == 0
    said = capsys.readouterr().out
    assert said.count("ok  ") == 6 and "confirms" in said and "1000 captions" in said
    card = (out / "README.md").read_text()
    assert "step 2, 32 samples seen" in card and "| image_to_text_r10 |" in card
    stored = {str(tensor.dtype) for tensor in load_file(out / "open_clip_model.safetensors").values()}
    assert stored == ({"torch.float16", "torch.float32"} if half else {"torch.float32"})


def change_config(folder: Path, section: str | None, key: str, value: Any) -> None:
    file = folder / "open_clip_config.json"
    content = json.loads(file.read_text())
    owner = content["model_cfg"][section] if section else content["model_cfg"]
    owner.pop(key) if value is None else owner.update({key: value})
    file.write_text(json.dumps(content))


WRONG: dict[str, tuple[str, str | None, str, Any, str]] = {
    "activation": ("zero1_sentencepiece", None, "quick_gelu", True, "image features"),
    "activation the other way": ("clip_bpe", None, "quick_gelu", None, "image features"),
    "vision epsilon": ("zero3_options", "vision_cfg", "norm_kwargs", None, "image features"),
    "text epsilon": ("zero1_sentencepiece", "text_cfg", "norm_kwargs", {"eps": 1e-6}, "text features"),
    "vision pooling": ("zero1_sentencepiece", "vision_cfg", "pool_type", "avg", "image features"),
    "vision pooling the other way": ("clip_bpe", "vision_cfg", "pool_type", "tok", "image features"),
    "text pooling": ("zero1_sentencepiece", "text_cfg", "pool_type", "argmax", "text features"),
    "head width": ("zero3_options", "vision_cfg", "head_width", 64, "image features"),
    "context length": ("zero1_sentencepiece", "text_cfg", "context_length", 24, "text features"),
}


@pytest.mark.multiprocess
@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_configuration_is_not_confirmed(
    what: str,
    run_of: Folder,
    exported: Folder,
    tmp_path: Path,
    open_clip: ModuleType,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, section, key, value, fails = WRONG[what]
    out = tmp_path / "out"
    shutil.copytree(exported(name), out)
    change_config(out, section, key, value)
    assert export.main([str(run_of(name)), str(out), "--verify-only", "--images", "8"]) == 1
    said = capsys.readouterr().out
    assert f"FAIL {fails}" in said and "does NOT confirm" in said


@pytest.mark.multiprocess
def test_a_wrong_weight_preprocessing_or_tokenizer_is_not_confirmed(
    run_of: Folder, exported: Folder, tmp_path: Path, open_clip: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "zero1_sentencepiece"
    verify = [str(run_of(name)), str(tmp_path / "out"), "--verify-only", "--images", "8"]

    def fresh() -> Path:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        return Path(shutil.copytree(exported(name), tmp_path / "out"))

    weights_file = fresh() / "open_clip_model.safetensors"
    weights = load_file(weights_file)
    weights["visual.proj"][0, 0] += 0.01
    save_file(weights, weights_file)
    assert export.main(verify) == 1 and "FAIL image features" in capsys.readouterr().out

    config_file = fresh() / "open_clip_config.json"
    config = json.loads(config_file.read_text())
    config["preprocess_cfg"]["mean"] = [0.5, 0.5, 0.5]
    config_file.write_text(json.dumps(config))
    assert export.main(verify) == 1 and "FAIL preprocessing" in capsys.readouterr().out

    tokenizer_file = fresh() / "tokenizer.json"
    tokenizer = json.loads(tokenizer_file.read_text())
    tokenizer["normalizer"] = None
    tokenizer_file.write_text(json.dumps(tokenizer))
    assert export.main(verify) == 1 and "FAIL captions with other token ids" in capsys.readouterr().out


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", RUNS)
def test_an_exported_folder_is_evaluated_as_its_run(
    name: str, run_of: Folder, exported: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = []
    for model in (run_of(name), exported(name)):
        assert evaluate.main([str(model), "--out", str(tmp_path / "out.json")]) == 0
        results.append(json.loads((tmp_path / "out.json").read_text())["results"])
        results[-1].pop("seconds")
    assert results[0] == results[1] and results[0]["pairs"] == 500
    assert "image_to_text_r10" in capsys.readouterr().out


@pytest.mark.multiprocess
def test_export_of_an_imported_export_is_the_same_tensor_by_tensor(
    run_of: Folder, exported: Folder, tmp_path: Path
) -> None:
    for name in RUNS:
        again = tmp_path / name
        assert export.main([str(exported(name)), str(again)]) == 0
        first, second = (load_file(folder / "open_clip_model.safetensors") for folder in (exported(name), again))
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
        configs = [json.loads((f / "open_clip_config.json").read_text()) for f in (exported(name), again)]
        assert configs[0] == configs[1]


@pytest.mark.multiprocess
def test_a_run_starts_from_an_exported_folder(
    run_of: Folder, exported: Folder, tmp_path: Path, run_cli: RunCli, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "zero1_sentencepiece"
    start = [*TINY, f"run.folder={tmp_path}", "run.name=tuned", f"model.init_from={exported(name)}"]
    frozen = ["optimizer.lr=1e-30", "optimizer.weight_decay=0.0"]  # what it starts from is what it ends with
    command = ["python", "cmpt/train.py", "recipes/quickstart.yaml"]
    done = run_cli([*command, *start, *frozen])
    assert done.returncode == 0, done.stderr
    ours, theirs = (open_model(str(path)).clip.state_dict() for path in (tmp_path / "tuned", exported(name)))
    assert all(torch.allclose(ours[key], theirs[key], rtol=0.0, atol=1e-20) for key in theirs)

    # Two processes say it once; and a run that has begun goes on without what it began from.
    done = run_cli([*TORCHRUN, *command[1:], *start, "run.name=other", "image.size=64", "image.mean=[0.5, 0.5, 0.5]"])
    for fault in ("image.size is 64, there it is 96; a phase can change it", "image.mean is [0.5, 0.5, 0.5]"):
        assert done.returncode == 1 and done.stderr.count(fault) == 1, done.stderr
    assert done.stderr.count("error:") == 1 and not (tmp_path / "other").exists()
    done = run_cli([*command, *start, *frozen, "model.init_from=gone", "run.stop_after=null"])
    assert done.returncode == 0, done.stderr
    with pytest.raises(SystemExit):
        checked_recipe([command[-1], *start, *frozen, "model.init_from=gone", "run.name=other"])
    assert 'model.init_from = "gone": no such file or folder' in capsys.readouterr().err


@pytest.mark.multiprocess
def test_bad_checkpoints_and_targets_are_named(
    run_of: Folder, exported: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_of("zero1_sentencepiece"), run)
    (checkpoint,) = (run / "checkpoints").glob("step_*")

    def fault(*arguments: str) -> str:
        assert export.main(list(arguments)) == 2
        return capsys.readouterr().err

    out = str(tmp_path / "out")
    assert "exists already and is not an empty folder" in fault(str(run), str(exported("zero1_sentencepiece")))
    assert "no such file or folder" in fault(str(tmp_path / "gone"), out)
    assert "is not a run (checkpoints/), a checkpoint (MANIFEST.json) or an open_clip folder" in fault(
        str(tmp_path), out
    )
    assert "is not an exported folder" in fault(str(run), out, "--verify-only")
    assert "Permission denied" in fault(str(run), "/proc/out") or "No such file" in fault(str(run), "/proc/out")
    weights = checkpoint / "part-00000-of-00002.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    assert "the manifest says" in fault(str(checkpoint), out)
    assert "holds no sound checkpoint" in fault(str(run), out)
    (checkpoint / "MANIFEST.json").unlink()
    assert "no readable MANIFEST.json" in fault(str(checkpoint), out)
    assert not Path(out).exists()


@pytest.mark.multiprocess
def test_what_open_clip_cannot_express_is_named(
    run_of: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_of("zero1_sentencepiece"), run)
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("pooling: eos", "pooling: argmax"))
    assert export.main([str(run), str(tmp_path / "out")]) == 2
    assert "model.text.pooling = argmax: must be eos with this tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_open_clip_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import with_open_clip

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e '.\[open-clip\]'"):
        with_open_clip.import_open_clip()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_bare_file_of_open_clips_is_evaluated_and_exported(
    suffix: str, tmp_path: Path, open_clip: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody else's weights of a native ViT, here open_clip's own initialisation of its smallest."""
    torch.manual_seed(0)
    theirs = open_clip.create_model("ViT-S-32-alt", load_weights=False).state_dict()
    file = tmp_path / f"weights{suffix}"
    save_file(theirs, file) if suffix == ".safetensors" else torch.save({"state_dict": theirs}, file)
    assert evaluate.main([str(file), "data.heldout=[gone.tar]"]) == 2
    assert "gone.tar" in capsys.readouterr().err
    opened = open_model(str(file), ["model.quick_gelu=true"])
    assert opened.recipe.model.quick_gelu and opened.recipe.tokenizer.kind == "clip_bpe"
    out = tmp_path / "out"
    assert export.main([str(file), str(out), "--verify", "--images", "4"]) == 0
    assert "confirms" in capsys.readouterr().out
    back = to_open_clip(dict(open_model(str(out)).clip.named_parameters()), opened.recipe.model)
    assert all(torch.equal(back[key], theirs[key]) for key in theirs)


@pytest.mark.multiprocess
def test_a_temperature_beyond_its_bound_exports_as_the_bound(
    run_of: Folder, tmp_path: Path, open_clip: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = open_model(str(run_of("zero1_sentencepiece")))
    with torch.no_grad():
        opened.clip.logit_scale.fill_(math.log(100) + 3e-3)
    export.export(opened, tmp_path / "out", half=False)
    assert verify_export(opened, tmp_path / "out", 4, 20), capsys.readouterr().out
    assert "final temperature 0.01000" in (tmp_path / "out" / "README.md").read_text()
    with torch.no_grad():
        opened.clip.visual.proj.weight[0, 0] = math.nan
    with pytest.raises(FormatError, match="not a number or infinite in: visual.proj"):
        export.export(opened, tmp_path / "other", half=False)


@pytest.mark.multiprocess
def test_a_model_exports_at_the_image_size_of_its_last_phase(
    tmp_path: Path, run_cli: RunCli, open_clip: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    phases = "phases=[{name: small, duration: 1 steps}, {name: large, duration: 1 steps, set: {image.size: 128}}]"
    changes = [phases, "run.duration=null", "run.stop_after=null", f"run.folder={tmp_path}", "run.name=grown"]
    done = run_cli(
        ["python", "cmpt/train.py", "recipes/quickstart.yaml", *TINY, "run.checkpoint_every=1 steps", *changes]
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "grown"
    for step, size, rows in ((1, 96, 145), (2, 128, 257)):
        out = tmp_path / f"out{step}"
        assert export.main([str(run / f"checkpoints/step_{step:08d}"), str(out), "--verify", "--images", "4"]) == 0
        assert ("interpolated from 96 px" in capsys.readouterr().out) == (size == 128)
        assert f"image size, patch: {size} px, 8 px" in (out / "README.md").read_text()
        assert len(load_file(out / "open_clip_model.safetensors")["visual.positional_embedding"]) == rows


@pytest.mark.multiprocess
def test_merges_that_are_not_clips_are_refused(
    run_of: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from cmpt.data.tokenizer import _merges_of_open_clip

    run = tmp_path / "run"
    shutil.copytree(run_of("clip_bpe"), run)
    lines = gzip.decompress(_merges_of_open_clip().read_bytes()).decode().split("\n")
    lines[2000], lines[2001] = lines[2001], lines[2000]
    (tmp_path / "merges.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    recipe = run / "recipe.yaml"
    text = recipe.read_text()
    assert "  path: null\n" in text
    recipe.write_text(text.replace("  path: null\n", f"  path: {tmp_path}/merges.txt.gz\n"))
    assert export.main([str(run), str(tmp_path / "out")]) == 2
    assert "merges.txt.gz: must hold CLIP's own merges" in capsys.readouterr().err


@pytest.mark.multiprocess
def test_overrides_of_what_belongs_to_the_weights_are_refused(
    run_of: Folder, exported: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    for model in (run_of("zero1_sentencepiece"), exported("zero1_sentencepiece")):
        for override in ("model.quick_gelu=true", "image.mean=[0.5, 0.5, 0.5]", "image.size=64", "tokenizer.path=x"):
            assert evaluate.main([str(model), override]) == 2
            assert f"{override.partition('=')[0]}: cannot be overridden" in capsys.readouterr().err
        assert evaluate.main([str(model), "evaluation.batch_size=0"]) == 2
        assert "evaluation.batch_size = 0: must be >= 1" in capsys.readouterr().err
    assert open_model(str(exported("zero1_sentencepiece"))).recipe.model.preset == "tiny-8"
