"""Every export is opened by what it is for, and computes there what the trained policy computes."""

from __future__ import annotations

import gc
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybrid_rl import merged_files
from hybrid_rl.adaptation import WEIGHTS, Start, apply_plan, read_start, write_weights
from hybrid_rl.checkpoint import STATE, TrainerState, load_state, write_state
from hybrid_rl.cli import main
from hybrid_rl.cluster.base import worker_environment
from hybrid_rl.components import UnknownArchitecture, read_model
from hybrid_rl.config import ConfigError, ModelConfig, PlanConfig
from hybrid_rl.config_file import parse_config
from hybrid_rl.digests import digest_of_all
from hybrid_rl.export import FORMATS, export_run, load_export, open_export
from hybrid_rl.files import describe
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.plan_building import build_plan
from hybrid_rl.run_directory import dump_config
from hybrid_rl.treatments import ADAPTERS
from hybrid_rl.treatments import LoraConfig as LoraSettings
from tests.families import FAMILIES, build
from trainers.setup import check_task

IDS = torch.arange(4, 24)[None]
DATA = {"train": "arithmetic@train", "eval": "arithmetic@eval"}
SAME = {"atol": 1e-5, "rtol": 1e-5}


@dataclass
class Run:
    """A run directory, and the policy in its checkpoint."""

    path: Path
    model: Path
    plan: AdaptationPlan
    adapted: Any

    @property
    def settings(self) -> ModelConfig:
        return ModelConfig(path=str(self.model))

    def export(self, to: str, out: Path, rank: int | None = None) -> Path:
        return export_run(self.path, to, out, rank).directory

    def weights(self) -> dict[str, Tensor]:
        return load_file(self.path / "checkpoints/step_000003" / WEIGHTS)

    def change_state(self, **changes: Any) -> None:
        checkpoint = self.path / "checkpoints/step_000003"
        state = replace(load_state(checkpoint), **changes)
        write_state(checkpoint, state, {WEIGHTS: describe(checkpoint / WEIGHTS)})


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS % model.config.get_text_config().vocab_size, use_cache=False).logits.float()


def load(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def write_run(path: Path, model: Path, plan: AdaptationPlan, tree: dict, step: int = 3) -> Run:
    """A run of `step` steps whose trained weights are noise around where they started."""
    adapted = apply_plan(load(model), plan)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.trained.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    checkpoint = path / "checkpoints" / f"step_{step:06d}"
    checkpoint.mkdir(parents=True)
    write_weights(adapted.trained.items(), checkpoint / WEIGHTS)
    base = digest_of_all(load(model).named_parameters())
    write_state(checkpoint, TrainerState(step, 0, plan.hash, base=base), {WEIGHTS: describe(checkpoint / WEIGHTS)})
    plan.save(path / "plan.json")
    (path / "config.yaml").write_text(dump_config(parse_config({**tree, "model": {"path": str(model)}, "steps": 3})))
    rows = [{"step": i, "reward/mean": i / 10, "eval/accuracy": i / 4} for i in (1, 2, 3)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Run(path, model, plan, adapted)


def plan_of(
    model: Path, treatment: str, ratio: float = 0.0, *, ranks: bool = True, rank: int = 4, **settings: Any
) -> AdaptationPlan:
    """`treatment` on every candidate but the best `ratio`, which are full."""
    anatomy = read_model(load(model))
    scores = {w.name: float(i) for i, w in enumerate(anatomy.candidates)}
    lora = LoraSettings(rank=rank, ranks={"*o_proj": 2} if ranks else {})
    origin: dict[str, Any] = {"model": str(model), "method": {}, "seed": 0}
    return build_plan(
        anatomy, scores, settings=PlanConfig(**settings), lora=lora, rest=treatment, ratio=ratio, **origin
    )


PLANS = {
    **{name: {"treatment": name} for name in ADAPTERS},
    "full": {"treatment": "frozen", "ratio": 0.3},
    "hybrid": {"treatment": "lora", "ratio": 0.2, "also_full": ["*norm*", "lm_head"]},
    "hybrid_dora": {"treatment": "dora", "ratio": 0.2},
    **{name: {"treatment": name, "ranks": False} for name in ("vera", "randlora")},
    "vera_of_two_ranks": {"treatment": "vera"},
    "more_ranks_than_rows": {"treatment": "molf_efficient", "rank": 20},
}
NATIVE = {
    **{"dora": ("LORA", True), "hybrid_dora": ("LORA", True)},
    **{name: (name.upper(), False) for name in ("ia3", "vera", "randlora")},
}
"""What PEFT has a type of its own for."""


@pytest.fixture(scope="module")
def untied(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with an output head of its own, in two files."""
    model = load(tiny_model)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 0.01)
    path = tmp_path_factory.mktemp("untied") / "model"
    model.save_pretrained(path, max_shard_size="150KB")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(path)
    assert (path / "model.safetensors.index.json").is_file()
    return path


@pytest.fixture
def make_run(tiny_tree: dict, untied: Path, tmp_path: Path):
    def make(name: str, model: Path = untied) -> Run:
        return write_run(tmp_path / f"run_{name}", model, plan_of(model, **PLANS[name]), tiny_tree)

    return make


@pytest.mark.parametrize("name", PLANS)
def test_each_format_computes_what_was_trained(name: str, make_run: Any, tmp_path: Path):
    run: Run = make_run(name)
    wanted = logits(run.adapted.model)
    assert (wanted - logits(load(run.model))).abs().max() > 1e-3

    merged = run.export("merged", tmp_path / "merged")
    torch.testing.assert_close(logits(load(merged)), wanted, **SAME)
    base, now = all_tensors(run.model), all_tensors(merged)
    changed = {n for n in base if not torch.equal(base[n], now[n])}
    assert base.keys() == now.keys()
    assert changed == {f"{m.name}.weight" for m in run.plan.modules if m.treatment != "frozen"}
    assert AutoTokenizer.from_pretrained(merged)("1+1=") == AutoTokenizer.from_pretrained(run.model)("1+1=")

    peft = run.export("peft", tmp_path / "peft")
    loaded = PeftModel.from_pretrained(load(run.model), str(peft)).eval()
    torch.testing.assert_close(logits(loaded), wanted, **SAME)
    taken_over = load_export(peft, run.settings)
    torch.testing.assert_close(logits(taken_over.model), wanted, **SAME)
    config = json.loads((peft / "adapter_config.json").read_text())
    assert (config["peft_type"], config.get("use_dora", False)) == NATIVE.get(name, ("LORA", False))
    if name in NATIVE:  # trained on as what they are, not as whole weights
        assert taken_over.trained.keys() == run.adapted.trained.keys()

    delta = run.export("delta", tmp_path / "delta")
    again = load_export(delta, run.settings)
    stored = run.weights()
    assert stored.keys() == again.trained.keys()
    assert all(torch.equal(stored[n], p) for n, p in again.trained.items())
    torch.testing.assert_close(logits(again.model), wanted, **SAME)


def test_a_plan_of_every_treatment_at_once(untied: Path, tiny_tree: dict, tmp_path: Path):
    """PEFT has one type a directory: what is not of it is whole there."""
    plans = [plan_of(untied, name) for name in ADAPTERS]
    modules = [plans[i % len(plans)].modules[i] for i in range(len(plans[0].modules))]
    modules[-1] = replace(modules[-1], treatment="full", rank=None, alpha=None, options={})
    assert {m.treatment for m in modules} == {*ADAPTERS, "full"}
    run = write_run(tmp_path / "run", untied, replace(plans[0], modules=tuple(modules)), tiny_tree)
    wanted = logits(run.adapted.model)
    torch.testing.assert_close(logits(load(run.export("merged", tmp_path / "merged"))), wanted, **SAME)
    peft, delta = run.export("peft", tmp_path / "peft"), run.export("delta", tmp_path / "delta")
    loaded = PeftModel.from_pretrained(load(untied), str(peft)).eval()
    for found in (loaded, load_export(peft, run.settings).model, load_export(delta, run.settings).model):
        torch.testing.assert_close(logits(found), wanted, **SAME)


def test_a_bias_that_ia3_scales_is_kept_beside_lora(tiny_tree: dict, tiny_model: Path, tmp_path: Path):
    """PEFT's one type is LoRA then, and a module with IA3 is whole there, bias and all."""
    model = tmp_path / "qwen2"
    build("qwen2", biases=0.1).save_pretrained(model)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(model)
    lora, ia3 = (plan_of(model, name, ranks=False) for name in ("lora", "ia3"))
    scaled = {m.name: m for m in ia3.modules if m.name.endswith(("q_proj", "k_proj"))}
    plan = replace(lora, modules=tuple(scaled.get(m.name, m) for m in lora.modules))
    run = write_run(tmp_path / "run", model, plan, tiny_tree)
    for to in FORMATS:
        check_reloaded(run, to, tmp_path / to)
    taken_over = load_export(tmp_path / "peft", run.settings)
    assert any(name.endswith("q_proj.bias") for name in taken_over.full)


def all_tensors(model: Path) -> dict[str, Tensor]:
    return {name: tensor for path in model.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_every_rank_of_matryoshka_is_its_slice(make_run: Any, tmp_path: Path):
    run: Run = make_run("matryoshka")
    weights = run.weights()
    for k in (1, 2, 3, 4):
        run.adapted.use_rank(k)
        wanted = logits(run.adapted.model)
        merged, peft = run.export("merged", tmp_path / f"m{k}", k), run.export("peft", tmp_path / f"p{k}", k)
        torch.testing.assert_close(logits(load(merged)), wanted, **SAME)
        loaded = PeftModel.from_pretrained(load(run.model), str(peft)).eval()
        torch.testing.assert_close(logits(loaded), wanted, **SAME)
        factors = load_file(peft / "adapter_model.safetensors")
        for m in run.plan.adapted:
            a, b = (factors[f"base_model.model.{m.name}.lora_{x}.weight"] for x in "AB")
            rank = min(k, m.rank or 0)
            assert torch.equal(a[:rank], weights[f"{m.name}.lora_A.default.weight"][:rank])
            torch.testing.assert_close(b[:, :rank], weights[f"{m.name}.lora_B.default.weight"][:, :rank] / rank**0.5)
            assert not a[rank:].any()
            assert len(a) == k
    for rank, to, part in ((5, "peft", "ranks from 1 to 4"), (0, "peft", "1 to 4"), (2, "delta", "keeps all")):
        with pytest.raises(ConfigError, match=part):
            run.export(to, tmp_path / "no", rank)


def test_a_bfloat16_model_gets_fp32_arithmetic_and_one_cast(tiny_tree: dict, tiny_model: Path, tmp_path: Path):
    """Its weights stay tied, and what is in another type in the files stays in it."""
    half = tmp_path / "half"
    shutil.copytree(tiny_model, half)
    stored = {n: t if "norm" in n else t.bfloat16() for n, t in load_file(half / "model.safetensors").items()}
    save_file(stored, half / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((half / "config.json").read_text()) | {"auto_map": {"AutoConfig": "code.Mine"}}
    (half / "config.json").write_text(json.dumps(config))
    (half / "chat_template.jinja").write_text("{{ messages }}")
    (half / "code.py").write_text("class Mine: ...")
    (half / "optimizer.json").write_text("{}")  # is not of the model
    plan = plan_of(half, "lora", 0.3, also_full=["*input_layernorm"])
    run = write_run(tmp_path / "run", half, plan, tiny_tree)
    merged = run.export("merged", tmp_path / "merged")
    now, weights, rounding = all_tensors(merged), run.weights(), open_export(merged).manifest["rounding"]
    assert "lm_head.weight" not in now
    kept = {p.name for p in half.iterdir()} - {"optimizer.json"}
    assert {p.name for p in merged.iterdir()} == kept | {"export.json", "plan.json", "README.md"}
    for name in kept - {"model.safetensors"}:
        assert (merged / name).read_bytes() == (half / name).read_bytes()
    assert now.keys() == stored.keys()
    for m in plan.modules:
        name = f"{m.name}.weight"
        if m.treatment == "full":
            policy = weights[name]
        else:
            a, b = (weights[f"{m.name}.lora_{x}.default.weight"] for x in "AB")
            policy = stored[name].float() + (b * (m.alpha / m.rank)) @ a  # type: ignore[operator]
        assert now[name].dtype == stored[name].dtype
        assert torch.equal(now[name], policy.to(stored[name].dtype)), name
        error = (now[name].float() - policy).abs()
        assert rounding[name]["max_error"] == pytest.approx(float(error.max()))
        assert rounding[name]["mean_error"] == pytest.approx(float(error.mean()), abs=1e-9)
    unchanged = stored.keys() - rounding.keys()
    assert all(torch.equal(now[n].view(torch.uint8), stored[n].view(torch.uint8)) for n in unchanged)
    probe = open_export(merged).manifest["probe"]
    assert 0 < probe["max_logit_difference"] < 0.1 * probe["max_logit"]
    torch.testing.assert_close(logits(load(merged)), logits(run.adapted.model), atol=0.1, rtol=0.1)


def test_sparse_changes_take_little_space_and_come_back_exactly(make_run: Any, tmp_path: Path):
    run: Run = make_run("full")
    weights, base = run.weights(), all_tensors(run.model)
    for name, tensor in weights.items():
        keep = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(0)) < 0.05
        weights[name] = torch.where(keep, tensor, base[name])
        weights[name].view(-1)[0] = -0.0
    write_weights(weights.items(), run.path / "checkpoints/step_000003" / WEIGHTS)
    run.change_state()
    dense = sum(t.nbytes for t in weights.values())
    delta = run.export("delta", tmp_path / "delta")
    assert (delta / "delta-00001.safetensors").stat().st_size < 0.2 * dense
    again = load_export(delta, run.settings).trained
    assert all(torch.equal(again[n].view(torch.int32), t.view(torch.int32)) for n, t in weights.items())


def test_whatever_is_damaged_or_of_another_model_is_refused(make_run: Any, tiny_model: Path, tmp_path: Path):
    run: Run = make_run("hybrid")
    for to in ("peft", "merged", "delta"):
        out = run.export(to, tmp_path / to)
        listed = open_export(out).manifest["files"]
        assert {p.name for p in out.iterdir()} == {*listed, "export.json", "README.md"}
        (out / "README.md").write_text("my own words")
        for name in listed:
            good = (out / name).read_bytes()
            (out / name).write_bytes(good[:-9] + bytes([good[-9] ^ 1]) + good[-8:])
            with pytest.raises(ConfigError, match=f"{name} is not what was exported"):
                open_export(out)
            (out / name).unlink()
            with pytest.raises(ConfigError, match=f"no {name}"):
                open_export(out)
            (out / name).write_bytes(good)
        open_export(out)
        if to != "merged":
            other = tmp_path / f"other_{to}"
            shutil.copytree(run.model, other)
            path = next(p for p in other.glob("*.safetensors") if "model.norm.weight" in load_file(p))
            save_file({**load_file(path), "model.norm.weight": torch.ones(64) * 1.5}, path, metadata={"format": "pt"})
            with pytest.raises(ConfigError, match=r"1 tensors differ, e\.g\. model\.norm\.weight"):
                load_export(out, ModelConfig(path=str(other)))
        with pytest.raises(ConfigError, match="exists already"):
            run.export(to, out)


def test_the_merged_model_is_compared_with_the_policy_rounded_as_it_is(
    tiny_tree: dict, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In bf16 the policy itself is no measure: a mistake could pass for rounding."""
    half = tmp_path / "half"
    load(tiny_model, torch.bfloat16).save_pretrained(half)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(half)
    run = write_run(tmp_path / "run", half, plan_of(half, "lora", ranks=False), tiny_tree)
    by_key = merged_files._by_key

    def swapped(*arguments: Any) -> Any:
        forms = by_key(*arguments)
        first, second = (form for form in forms.values() if "q_proj" in min(form))
        [a], [b] = first, second
        first[a], second[b] = second[b], first[a]
        return forms

    run.export("merged", tmp_path / "right")
    monkeypatch.setattr(merged_files, "_by_key", swapped)
    with pytest.raises(RuntimeError, match="from the policy's"):
        run.export("merged", tmp_path / "wrong")


def test_a_hub_models_code_stays_there(tmp_path: Path):
    names = {"AutoTokenizer": ["code.Tokens", None], "AutoModel": "code.Mine", "AutoConfig": "other/one--code.Config"}
    source, out = tmp_path / "snapshot", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    for name in ("config.json", "tokenizer_config.json"):
        (source / name).write_text(json.dumps({"auto_map": names}))
    (source / "code.py").write_text("")
    merged_files._copy_rest("of/hub", source, out)
    assert {path.name for path in out.iterdir()} == {"config.json", "tokenizer_config.json"}
    for path in out.iterdir():
        assert json.loads(path.read_text())["auto_map"] == {
            "AutoTokenizer": ["of/hub--code.Tokens", None],
            "AutoModel": "of/hub--code.Mine",
            "AutoConfig": "other/one--code.Config",
        }


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda tree: tree.pop("files"), "files"),
        (lambda tree: tree.update(base=[]), "base"),
        (lambda tree: tree["base"].update(tensors=[1]), "base.tensors"),
        (lambda tree: tree.update(format="onnx"), "format"),
        (lambda tree: tree.update(version=7), "of version 7"),
        (lambda tree: tree["files"].pop("delta-00001.safetensors"), "does not list"),
    ],
)
def test_a_damaged_manifest_is_refused(change: Any, why: str, make_run: Any, tmp_path: Path):
    run: Run = make_run("full")
    out = run.export("delta", tmp_path / "out")
    tree = json.loads((out / "export.json").read_text())
    change(tree)
    (out / "export.json").write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=why):
        open_export(out)
    (out / "export.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        open_export(out)


def test_what_an_export_does_not_list_is_refused(make_run: Any, tmp_path: Path):
    """By format, not by what lies beside: an adapter_config.json does not make a delta an adapter."""
    out = make_run("full").export("delta", tmp_path / "out")
    for name in ("eval.json", "eval_ranks.png", "README.md", ".gitattributes"):
        (out / name).write_text("")
    open_export(out)
    for name in ("delta-99999.safetensors", "adapter_config.json"):
        (out / name).write_text("{}")
        with pytest.raises(ConfigError, match=f"has {name}, which export.json does not list"):
            open_export(out)
        (out / name).unlink()


@pytest.mark.parametrize("indices", [[-1], [10**6], [0, 1]])
def test_elements_that_a_tensor_has_not_are_refused(indices: list[int], make_run: Any, tmp_path: Path):
    run: Run = make_run("full")
    adapted = apply_plan(load(run.model), run.plan)
    name = next(iter(adapted.full))
    tensors = {f"{name}.indices": torch.tensor(indices, dtype=torch.int32), f"{name}.values": torch.ones(1)}
    save_file(tensors, tmp_path / "delta-00001.safetensors")
    with pytest.raises(ValueError, match=r"has (elements|indices)"):
        read_start(adapted, Start(str(tmp_path), "delta"))


def test_another_base_model_than_the_runs_is_refused(
    make_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
):
    run: Run = make_run("lora")
    other = tmp_path / "other"
    shutil.copytree(run.model, other)
    path = next(p for p in other.glob("*.safetensors") if "model.norm.weight" in load_file(p))
    save_file({**load_file(path), "model.norm.weight": torch.ones(64) * 1.5}, path, metadata={"format": "pt"})
    arguments = ["export", str(run.path), "--to", "peft", f"model.path={other}", "--out"]
    assert main([*arguments, str(tmp_path / "no")]) == 2
    assert "is not the base model" in capsys.readouterr().err
    run.change_state(base="")
    assert main([*arguments, str(tmp_path / "trusted")]) == 0
    assert sum("taken on trust" in record.message for record in caplog.records) == 1


def test_a_failed_export_leaves_nothing(make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run: Run = make_run("lora")
    monkeypatch.setattr("hybrid_rl.export.write_peft", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.export("peft", tmp_path / "new" / "out")
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(
    ("family", "options", "formats"),
    [
        ("qwen2", {"treatment": "ia3"}, {"merged", "peft", "delta"}),
        ("qwen3_moe", {"also_full": ["*experts*", "*gate"]}, {"merged", "delta"}),
        ("deepseek_v3", {}, {"merged", "peft", "delta"}),
        ("falcon_h1", {}, {"merged", "peft", "delta"}),
        ("falcon_h1", {"also_full": ["*A_log", "*conv1d"]}, {"merged", "delta"}),
        ("zamba2", {}, {"merged", "peft", "delta"}),
        ("hrm_text", {}, {"merged", "peft", "delta"}),
        ("qwen3_5_vl", {}, {"merged", "peft", "delta"}),
        ("gpt_oss", {"also_full": ["*.q_proj.bias", "*sinks"]}, {"merged", "delta"}),
        ("qwen2", {"also_full": ["*.q_proj.bias"]}, {"merged", "peft", "delta"}),
    ],
)
def test_other_architectures(
    family: str, options: dict, formats: set, tiny_model: Path, tiny_tree: dict, tmp_path: Path
):
    """Experts in parts, bare parameters, shared weights, a model in a larger one; what cannot be is refused."""
    run = run_of_family(family, tiny_model, tiny_tree, tmp_path, **options)
    for to in FORMATS:
        if to in formats:
            check_reloaded(run, to, tmp_path / to)
            continue
        with pytest.raises(ConfigError, match=r"PEFT cannot hold this policy.*use --to merged or delta"):
            run.export(to, tmp_path / to)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_that_can_be_planned(family: str, tiny_model: Path, tiny_tree: dict, tmp_path: Path):
    try:
        run = run_of_family(family, tiny_model, tiny_tree, tmp_path)
    except (ConfigError, UnknownArchitecture) as error:
        pytest.skip(str(error).splitlines()[0])
    for to in FORMATS:
        check_reloaded(run, to, tmp_path / to)


def run_of_family(family: str, tokenizer: Path, tree: dict, directory: Path, **options: Any) -> Run:
    """LoRA beside full matrices."""
    path = directory / family
    build(family, biases=0.1).save_pretrained(path)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(path)
    plan = plan_of(path, **{"treatment": "lora", "ratio": 0.3, "ranks": False, **options})
    return write_run(directory / "run", path, plan, tree)


def check_reloaded(run: Run, to: str, out: Path) -> None:
    run.export(to, out)
    found = []
    if to == "merged":
        found.append(load(out))
        assert all_tensors(run.model).keys() == all_tensors(out).keys()
    else:
        found.append(load_export(out, run.settings).model)
    if to == "peft":
        found.append(PeftModel.from_pretrained(load(run.model), str(out)).eval())
    for model in found:
        torch.testing.assert_close(logits(model), logits(run.adapted.model), **SAME)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hybrid", "lora", "rslora", "pissa", "matryoshka", "molf_efficient"])
def test_vllm_serves_what_was_trained(name: str, make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The merged model, and the adapter where it is LoRA alone: the policy's greedy tokens and log-probabilities."""
    for variable, value in worker_environment(parse_config({"model": {"path": "m"}, "data": DATA}), gpus=False).items():
        monkeypatch.setenv(variable, value)
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest

    run: Run = make_run(name)
    merged, peft = run.export("merged", tmp_path / "merged"), run.export("peft", tmp_path / "peft")
    prompts = [[20, 21, 22], [30, 31, 32, 33, 34]]
    sampling = SamplingParams(temperature=0.0, max_tokens=8, logprobs=0, ignore_eos=True)
    served: list[tuple[Path, LoRARequest | None]] = [(merged, None)]
    if name == "hybrid":
        assert "vllm" not in open_export(peft).manifest["commands"]
    else:
        served.append((run.model, LoRARequest("policy", 1, str(peft))))
    for model, lora in served:
        options: dict[str, Any] = {"enable_lora": True, "max_lora_rank": 32} if lora else {}
        llm = LLM(model=str(model), dtype="float32", max_model_len=64, enforce_eager=True, **options)
        answers = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, lora_request=lora, use_tqdm=False)
        for prompt, answer in zip(prompts, answers, strict=True):
            tokens = list(answer.outputs[0].token_ids)
            with torch.no_grad():
                scores = run.adapted.model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
            assert scores.argmax(-1).tolist() == tokens
            found = torch.tensor([p[t].logprob for p, t in zip(answer.outputs[0].logprobs or (), tokens, strict=True)])
            torch.testing.assert_close(found, scores.log_softmax(-1).max(-1).values, atol=1e-4, rtol=1e-4)
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 6},
        {"r": 4, "lora_alpha": 6, "use_rslora": True},
        {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1.*": 9}, "modules_to_save": ["lm_head"]},
        {"r": 4, "use_dora": True, "bias": "none", "init_lora_weights": "gaussian"},
    ],
)
def test_lora_made_elsewhere_is_taken_over(options: dict, untied: Path, tmp_path: Path):
    torch.manual_seed(2)
    other: Any = get_peft_model(load(untied), LoraConfig(target_modules=["q_proj", "down_proj"], **options))
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    other.eval().save_pretrained(tmp_path / "adapter")
    export = open_export(tmp_path / "adapter")
    assert (export.format, export.plan, export.manifest) == ("peft", None, {})
    adapted = load_export(tmp_path / "adapter", ModelConfig(path=str(untied)))
    torch.testing.assert_close(logits(adapted.model), logits(other), **SAME)
    trained = {id(p) for p in other.parameters() if p.requires_grad}
    assert len(trained) == len(adapted.trained)
    assert sum(p.numel() for p in adapted.trained.values()) == sum(
        p.numel() for p in other.parameters() if p.requires_grad
    )


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"peft_type": "OFT"}, "peft_type=OFT"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
        ({"bias": "all"}, "bias='all'"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"of_the_future": True}, "of_the_future"),
    ],
)
def test_what_is_not_trained_here_is_refused(changes: dict, why: str, make_run: Any, untied: Path, tmp_path: Path):
    out = make_run("lora").export("peft", tmp_path / "out")
    (out / "export.json").unlink()
    path = out / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ConfigError, match="cannot be trained further") as caught:
        load_export(out, ModelConfig(path=str(untied)))
    assert why in str(caught.value)


@pytest.mark.parametrize("damage", ["width", "truncated", "lora_alpha", "saved"])
def test_an_adapter_that_does_not_fit_is_refused(damage: str, untied: Path, tiny_tree: dict, tmp_path: Path):
    """Before any worker starts, by the model's shapes alone."""
    torch.manual_seed(2)
    saved = ["lm_head"] if damage == "saved" else None
    other = get_peft_model(load(untied), LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=saved))
    other.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:200])
    elif damage == "lora_alpha":
        config = tmp_path / "adapter" / "adapter_config.json"
        tree = json.loads(config.read_text())
        del tree["lora_alpha"]
        config.write_text(json.dumps(tree))
    else:
        part = "lm_head" if damage == "saved" else "lora_A"
        tensors = {n: t[:, :-1].contiguous() if part in n else t for n, t in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    why = {"truncated": "cannot be read", "lora_alpha": "lora_alpha=None"}.get(damage, "of shape")
    with pytest.raises(ConfigError, match=f"cannot be trained further.*{why}"):
        load_export(tmp_path / "adapter", ModelConfig(path=str(untied)))
    settings = {**tiny_tree, "model": {"path": str(untied)}, "plan": {"start": str(tmp_path / "adapter")}}
    with pytest.raises(ConfigError, match=f"cannot be trained further.*{why}"):
        check_task(parse_config(settings))


def test_damaged_checkpoints_are_refused(make_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture):
    run: Run = make_run("lora")
    for name, how in ((WEIGHTS, "is not what was written"), (STATE, "cannot be read")):
        path = run.path / "checkpoints/step_000003" / name
        whole = path.read_bytes()
        path.write_bytes(whole[:100])
        assert main(["export", str(run.path), "--to", "merged", "--out", str(tmp_path / "no")]) == 2
        assert main(["eval", str(run.path / "config.yaml"), "--checkpoint", str(run.path)]) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hybrid-rl ")]
        assert len(errors) == 2
        assert all(f"{name} {how}" in error for error in errors)
        path.write_bytes(whole)


def test_card_and_manifest(make_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture):
    run: Run = make_run("hybrid")
    settings = yaml.safe_load((run.path / "config.yaml").read_text())
    settings["rewards"] = [{"plugin": f"{tmp_path}/mine|<b>.py:f"}]
    (run.path / "config.yaml").write_text(yaml.safe_dump(settings))
    summary = {"steps": 3, "eval_before": {"eval/accuracy": 0.5}, "eval_after": {"eval/accuracy": 0.75}}
    (run.path / "summary.json").write_text(json.dumps(summary))
    origin = {"format": "delta", "step": 7, "rank": None, "plan": "0f", "started_from": {"format": "peft"}}
    run.change_state(started_from=origin)
    out = tmp_path / "out"
    assert main(["export", str(run.path), "--to", "merged", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"exported    {out}, merged, step 3" in printed
    manifest, card = json.loads((out / "export.json").read_text()), (out / "README.md").read_text()
    assert manifest["step"] == 3
    assert manifest["metrics"]["eval/accuracy"] == 0.75
    assert manifest["summary"]["eval_before"]["eval/accuracy"] == 0.5
    assert AdaptationPlan.load(out / "plan.json") == run.plan
    assert "0.75" in card
    assert "| full | lora |" in card
    assert "vllm serve DIR" in card
    assert r"mine\|\<b\>.py:f" in card
    assert manifest["summary"]["eval_after"] == {"eval/accuracy": 0.75}
    assert manifest["started_from"] == origin
    assert "an export (`delta`) after step 7, plan 0f, which started from an export (`peft`), made elsewhere" in card
    assert "| lora: rank | 4 or 2 |" in card
    assert "base_model" not in yaml.safe_load(card.split("---")[1])  # it is on no hub
    assert f"# {run.model.name}, trained by" in card
    assert str(run.model) not in card
    for text in (card, json.dumps(manifest)):
        assert str(tmp_path) not in text.replace(str(run.model), "")


def test_the_card_has_what_its_treatments_are_made_of(make_run: Any, tmp_path: Path):
    """And nothing of a step that was not exported."""
    run: Run = make_run("matryoshka")
    (run.path / "summary.json").write_text(json.dumps({"steps": 5, "eval_after": {"eval/accuracy": 0.5}}))
    out = run.export("delta", tmp_path / "out")
    assert json.loads((out / "export.json").read_text())["summary"] == {"steps": 5}
    card = (out / "README.md").read_text()
    assert "| matryoshka: loss | sum |" in card
    assert "| matryoshka: ranks | \\[1, 2, 4\\]" in card
    assert "molf" not in card
    card = (make_run("molf").export("delta", tmp_path / "molf") / "README.md").read_text()
    assert "molf.top\\_k" in card


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--to", "onnx"], ["--to onnx", "peft, merged, delta"]),
        (["--to", "peft", "--rank", "2"], ["--rank 2", "matryoshka"]),
        (["--to", "peft", "--checkpoint", "nowhere"], ["--checkpoint nowhere", "neither a finished checkpoint"]),
        (["--to", "peft", "steps=4"], ["steps=4", "model.path"]),
        (["--to", "peft", "model.path=nowhere"], ["model.path='nowhere'"]),
    ],
)
def test_bad_input_is_status_2(
    arguments: list, parts: list, make_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture
):
    run: Run = make_run("lora")
    assert main(["export", str(run.path), *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in parts), error
    assert not (tmp_path / "out").exists()


def test_an_edited_plan_is_refused(make_run: Any, tmp_path: Path):
    run: Run = make_run("lora")
    edited = replace(run.plan, modules=(replace(run.plan.modules[0], alpha=1.0), *run.plan.modules[1:]))
    edited.save(run.path / "plan.json")
    with pytest.raises(ConfigError, match="was changed since step_000003 was saved"):
        run.export("delta", tmp_path / "out")
