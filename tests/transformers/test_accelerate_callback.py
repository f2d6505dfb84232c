"""Transformers' Trainer and TRL's SFTTrainer as they are, with AccelerateCallback: what PEFT
learns, and a report.
"""

import itertools
import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_models import config

pytest.importorskip("transformers")

import transformers
from accelerate.state import AcceleratorState
from tiny_llama import LAYERS, VOCABULARY, base, llama, tokens, trainable
from torch import Tensor
from trainers import rows, trainer

import delora_kernels as dk
from delora_kernels.integrations.transformers import accelerate_callback as integration
from delora_kernels.integrations.transformers.accelerate_callback import AccelerateCallback

METHODS = ("lora", "dora", "delora")

torch.set_num_threads(1)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deprecated and will be removed:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning"),
]


@pytest.fixture(autouse=True)
def _no_precision_of_another_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers of Transformers 4 leave bf16 behind, in the environment and in accelerate's
    state.
    """
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    AcceleratorState._reset_state(reset_partial_state=True)


def losses(trained: transformers.Trainer) -> Tensor:
    return torch.tensor([entry["loss"] for entry in trained.state.log_history if "loss" in entry], dtype=torch.float64)


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """How far two trainings ended from each other, relative to how far each parameter has come.

    Parameters of one number, DeLoRA's λ, count as one vector: a single one moves by what is left
    when terms cancel.
    """
    numbers = [name for name, value in theirs.items() if value.numel() == 1]
    ours, theirs, start = (
        {name: value for name, value in ends.items() if name not in numbers}
        | ({"numbers": torch.cat([ends[name].flatten() for name in numbers])} if numbers else {})
        for ends in (ours, theirs, start)
    )
    relative = [(ours[k] - theirs[k]).norm() / (theirs[k] - start[k]).norm() for k in theirs]
    return torch.stack(relative).square().mean().sqrt().item()


MODES: dict[str, dict[str, Any]] = {
    "accumulation and clipping": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.05},
    "bf16 autocast": {"bf16": True},
    "bf16 weights": {"bf16": True, "dtype": torch.bfloat16},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "non-reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "compile": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
}


@pytest.mark.parametrize(
    ("mode", "method"),
    [(mode, method) for mode in MODES for method in METHODS if mode != "compile" or method == "lora"],
)
def test_trains_as_peft_does(mode: str, method: str, seed: int, tmp_path: Path) -> None:
    """Where training ends is as near to where float64 ends as it is with PEFT's own layers."""
    torch._dynamo.reset()
    options = {"learning_rate": 1e-1 if method == "delora" else 1e-2} | MODES[mode]  # DeLoRA's factors must turn
    # a second block is another matter only where checkpoints make inputs require gradients
    dtype, blocks = options.pop("dtype", torch.float32), 2 if "reentrant" in mode else 1
    plain = {name: value for name, value in options.items() if name not in ("bf16", *MODES["compile"])}
    # each layer takes a second to trace
    adapted: Any = ["q_proj", "down_proj"] if mode == "compile" else "all-linear"
    ends, curves = {}, {}
    for run in ("exact", "PEFT", "fused"):
        made = llama(method, seed, dtype, blocks=blocks, target_modules=adapted)
        start = trainable(made)
        if run == "exact":
            made.double()
        if mode == "reentrant":  # Trainers before Transformers 5 leave it out; it breaks a compiled model's graph
            made.enable_input_require_grads()
        callback = AccelerateCallback(strict=True)
        # tracing takes seconds: only the fused run is compiled
        used = options if run == "fused" or (run == "PEFT" and mode != "compile") else plain
        trained = trainer(tmp_path, made, seed, [callback] if run == "fused" else [], **used)
        trained.train()
        ends[run], curves[run] = trainable(made), losses(trained)
    assert callback.report is not None
    assert (len(callback.report.fused), callback.report.declined) == (2 if mode == "compile" else 7 * blocks, ())
    theirs, ours = (distance(ends[run], ends["exact"], start) for run in ("PEFT", "fused"))
    # both are a few draws of rounding errors; a single gradient's is up to 64 eps of its accuracy
    # (see test_peft)
    assert ours <= 4 * theirs + 64 * torch.finfo(torch.float32).eps
    theirs, ours = ((curves[run] - curves["exact"]).abs().max().item() for run in ("PEFT", "fused"))
    assert ours <= 4 * theirs + 8 * torch.finfo(torch.bfloat16 if "bf16" in options else torch.float32).eps


@pytest.mark.parametrize("method", METHODS)
def test_save_resume_and_load(method: str, seed: int, tmp_path: Path) -> None:
    """A run that is saved and resumed ends at the bits of the whole run; what it saved is a PEFT
    adapter.
    """
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    whole = trainer(tmp_path / "whole", llama(method, seed), seed, [AccelerateCallback()], **options)
    whole.train()
    resumed = trainer(tmp_path / "resumed", llama(method, seed), seed, [AccelerateCallback()], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    ends = [trainable(run.model) for run in (whole, resumed)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])

    batch = tokens(seed + 2, 2, 9)
    whole.save_model(str(tmp_path / "saved"))
    for path in (tmp_path / "saved", tmp_path / "whole" / "checkpoint-4"):
        loaded = peft.PeftModel.from_pretrained(base(seed), path)
        expected = loaded(batch).logits  # PEFT's own layers
        torch.testing.assert_close(whole.model.eval()(batch).logits, expected, rtol=1e-5, atol=1e-5)


def test_load_best_model_at_end(seed: int, tmp_path: Path) -> None:
    """Its adapters are loaded into the fused layers; by this metric, a count, the first evaluation
    is the best.
    """
    options: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_count", "greater_is_better": False}
    run = trainer(tmp_path, llama("dora", seed), seed, [AccelerateCallback(strict=True)], **options)
    evaluations = itertools.count()
    run.compute_metrics = lambda _: {"count": float(next(evaluations))}
    run.train()
    seen = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert len(set(seen)) == 4
    assert run.evaluate()["eval_loss"] == pytest.approx(seen[0], rel=1e-6)
    loaded = peft.PeftModel.from_pretrained(base(seed), run.state.best_model_checkpoint)
    batch = tokens(seed + 2, 2, 9)
    torch.testing.assert_close(run.model.eval()(batch).logits, loaded(batch).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_sft_trainer(method: str, seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SFTTrainer makes the PEFT model itself, and checkpoints by default."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<end>": 0} | {f"w{i}": i for i in range(1, VOCABULARY)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<end>")),
        eos_token="<end>",
        pad_token="<end>",
    )
    data = datasets.Dataset.from_dict({"input_ids": tokens(seed, 16, 12).tolist()})
    ends, curves = [], []
    callback = AccelerateCallback(strict=True)
    for callbacks in ([], [callback]):
        settings: dict[str, Any] = {"max_steps": 4, "learning_rate": 1e-2, "adam_epsilon": 1e-3, "seed": seed}
        settings |= {"use_cpu": True, "bf16": False, "disable_tqdm": True, "report_to": [], "logging_steps": 1}
        args = trl.SFTConfig(output_dir=str(tmp_path), save_strategy="no", **settings)
        adapters = config(method, r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        torch.manual_seed(seed)
        parts = {"train_dataset": data, "processing_class": tokenizer, "peft_config": adapters}
        made = trl.SFTTrainer(base(seed), args, callbacks=callbacks, **parts)
        start = trainable(made.model)
        made.train()
        ends.append(trainable(made.model))
        curves.append(losses(made))
    assert callback.report is not None
    assert (len(callback.report.fused), callback.report.declined) == (LAYERS, ())
    assert capsys.readouterr().out.count(f"delora-kernels: fused {LAYERS} of {LAYERS} adapter layers") == 1
    # a gradient's rounding, 64 eps at most (see test_peft), moves each of four steps by as much,
    # Adam's root by half
    assert distance(ends[1], ends[0], start) <= 4 * 64 * 1.5 * torch.finfo(torch.float32).eps
    assert (curves[1] - curves[0]).abs().max() <= 64 * torch.finfo(torch.float32).eps * curves[0].max()


def test_callback_without_adapters(seed: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A flag that does nothing says so: a warning once, an error if strict; adapters that come
    later are seen.
    """
    callback = AccelerateCallback()
    with caplog.at_level(logging.INFO, logger=integration.__name__):
        made = base(seed)
        run = trainer(tmp_path, made, seed, [callback], max_steps=1)
        run.train()
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert "nothing was fused: AccelerateCallback: model must be one with PEFT adapter layers" in record.message
        assert "got a LlamaForCausalLM without any; give the Trainer a model of peft.get_peft_model" in record.message
        assert callback.report is None
        made.add_adapter(config("lora", target_modules=["q_proj"]))
        run.train()
    assert (
        caplog.records[1].message == str(callback.report) == "fused 2 of 2 adapter layers (2 lora) on the eager backend"
    )
    with pytest.raises(ValueError, match="AccelerateCallback: model must be one with PEFT adapter layers"):
        trainer(tmp_path, base(seed), seed, [AccelerateCallback(strict=True)])


def test_callback_says_what_is_not_fused(seed: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = llama("lora", seed)
    made.base_model.model.lm_head.register_forward_hook(lambda *_: None)  # not an adapter layer: no matter
    layer = made.base_model.model.model.layers[1].mlp.up_proj
    layer.base_layer.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="strict=True, but not every adapter layer can be fused: fused 13 of 14"):
        trainer(tmp_path, made, seed, [AccelerateCallback(strict=True)])
    callback = AccelerateCallback()
    with caplog.at_level(logging.INFO, logger=integration.__name__):
        trainer(tmp_path, made, seed, [callback], max_steps=1).train()
    assert callback.report is not None
    (declined,) = callback.report.declined
    assert declined.name.endswith("layers.1.mlp.up_proj")
    said = [(r.levelno, r.message) for r in caplog.records if r.name == integration.__name__]
    assert said == [(logging.WARNING, str(callback.report))]
    assert "the base layer has hooks" in caplog.text


def test_callback_is_quiet_beside_the_main_process(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    callback, made = AccelerateCallback(), llama("lora", seed)
    state = transformers.TrainerState(is_world_process_zero=False)
    callback.on_init_end(None, state, None, model=made)  # type: ignore[arg-type]
    assert callback.report is not None
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("wrapper", ["DistributedDataParallel", "torch.compile"])
def test_callback_on_wrapped_models(wrapper: str, seed: int, process_group: None) -> None:
    made = llama("lora", seed)
    callback, state = AccelerateCallback(strict=True), transformers.TrainerState(is_world_process_zero=True)
    if wrapper == "torch.compile":
        callback.on_train_begin(None, state, None, model=torch.compile(made))  # type: ignore[arg-type]
    else:
        wrapped = torch.nn.parallel.DistributedDataParallel(made)
        callback.on_train_begin(None, state, None, model=wrapped)  # type: ignore[arg-type]
        wrapped(tokens(seed, 2, 5)).logits.sum().backward()
    assert callback.report is not None
    assert (len(callback.report.fused), dk.restore(made)) == (LAYERS, LAYERS)


def fused_layers(made: Any) -> int:
    return sum(type(module).__name__ == "FusedLoraLinear" for module in made.modules())


def test_callback_added_late_and_undone(seed: int, tmp_path: Path) -> None:
    """Added as a class by add_callback, and one that restores the layers when training ends, at
    each train().
    """
    made, seen = llama("lora", seed), []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
            seen.append(fused_layers(model))

    run = trainer(tmp_path, made, seed, [Watch()], max_steps=1)
    assert fused_layers(made) == 0
    run.add_callback(AccelerateCallback)
    run.train()
    assert (seen, fused_layers(made)) == ([LAYERS], LAYERS)
    run.remove_callback(AccelerateCallback)
    run.add_callback(AccelerateCallback(restore_at_end=True))
    for _ in range(2):
        run.train()
        assert (seen[-1], fused_layers(made)) == (LAYERS, 0)


def test_callback_with_model_init(seed: int, tmp_path: Path) -> None:
    """A model made anew at train() is accelerated too."""
    args = transformers.TrainingArguments(output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to=[])
    made: list[Any] = []
    run = transformers.Trainer(
        args=args,
        model_init=lambda: made.append(llama("lora", seed)) or made[-1],  # type: ignore[func-returns-value]
        callbacks=[AccelerateCallback(strict=True)],
        train_dataset=rows(seed),
    )
    run.train()
    assert [fused_layers(one) for one in made] == [LAYERS, LAYERS]


def test_callback_takes_named_bools(seed: int) -> None:
    """A model or a word in the place of `strict` would be taken for True."""
    with pytest.raises(TypeError):
        AccelerateCallback(base(seed))  # type: ignore[misc]
    for wrong in ({"strict": "no"}, {"restore_at_end": 1}):
        (name,) = wrong
        with pytest.raises(TypeError, match=f"AccelerateCallback: {name} must be a bool"):
            AccelerateCallback(**wrong)  # type: ignore[arg-type]
