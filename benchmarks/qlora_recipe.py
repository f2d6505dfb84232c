"""The recipe that 4-bit models are trained by: step time, peak bytes, the longest sequence.

    python -m benchmarks.qlora_recipe  # SmolLM2's widths, 2 blocks, LoRA and DoRA, fp32 compute
    python -m benchmarks.qlora_recipe --method dora --dtype bf16 --checkpointing reentrant
    python -m benchmarks.qlora_recipe --batches packed --limit-mib 256 --out runs/recipe.json

A Llama of random weights is stored in nf4 with double quantisation and loaded as Transformers
does, prepared by `peft.prepare_model_for_kbit_training`, and gets adapters on all its linears. A
step is `--accumulate` forward and backward passes and one of bitsandbytes' 8-bit AdamW (paged on a
GPU); padded batches have rows of different lengths with a mask, packed ones documents in one row
with position_ids. With --dtype bf16 a step runs under autocast, as Trainer(bf16=True) runs it.
Three models take turns: the frozen 4-bit one (its gradient goes back to the embeddings, and it has
no optimizer), PEFT's, and the same accelerated. Peaks are bytes beyond what was there before a
step; with --limit-mib the longest sequence is searched whose step stays within that many.
"""

import copy
import math
import statistics
import sys
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import peft
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor

import delora_kernels as dk
from benchmarks.memory import MIB, allocations
from benchmarks.overhead import interval, parser_of, write
from benchmarks.timing import Budget, clock_of, rounds
from benchmarks.whole_model import GRANULE

IMPLEMENTATIONS = ("frozen", "peft", "dk")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CHECKPOINTING = {"none": None, "reentrant": True, "non-reentrant": False}
BATCHES = ("padded", "packed")
ROWS, DOCUMENTS = 2, 3
"""Rows of a padded batch; documents in the one row of a packed batch."""
VOCABULARY = 1024


def four_bit_model(hidden: int, intermediate: int, heads: int, blocks: int, dtype: str, device: str) -> Any:
    """Return a Llama of random weights in nf4 with double quantisation, loaded as Transformers
    does.
    """
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": blocks}
    heads_of: dict[str, Any] = {"num_attention_heads": heads, "num_key_value_heads": heads // 3 or 1}
    config = transformers.LlamaConfig(**sizes, **heads_of, vocab_size=VOCABULARY, max_position_embeddings=2**17)
    quantised = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[dtype],
    )
    with tempfile.TemporaryDirectory() as folder:
        model: Any = transformers.LlamaForCausalLM(config)
        model.to(DTYPES[dtype]).save_pretrained(folder)
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=quantised, device_map=device, dtype=DTYPES[dtype]
        )


def models(base: Any, method: str, checkpointing: str, r: int) -> dict[str, Any]:
    """Return the three models, each with its own adapters of the same values."""
    reentrant = CHECKPOINTING[checkpointing]
    options: dict[str, Any] = (
        {} if reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    )
    base = peft.prepare_model_for_kbit_training(
        copy.deepcopy(base), use_gradient_checkpointing=reentrant is not None, **options
    )
    if reentrant is None:
        base.enable_input_require_grads()  # the frozen model's gradient, too, goes through all its blocks
    made: dict[str, Any] = {"frozen": base.train()}
    config: Any
    if method == "delora":
        dk.allow_delora_on_stored_bases()
        config = peft.DeloraConfig(r=r, target_modules="all-linear", task_type="CAUSAL_LM")
    else:
        config = peft.LoraConfig(r=r, use_dora=method == "dora", target_modules="all-linear", task_type="CAUSAL_LM")
    made["peft"] = peft.get_peft_model(copy.deepcopy(base), config).train()
    made["dk"] = copy.deepcopy(made["peft"])
    dk.accelerate(made["dk"], strict=True)
    return made


def batches(kind: str, sequence: int, count: int, device: str) -> Iterator[dict[str, Tensor]]:
    """Yield the batches of a step, of ROWS × `sequence` tokens at most, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        if kind == "packed":
            total = ROWS * sequence
            ids = torch.randint(VOCABULARY, (1, total), generator=generator)
            starts = torch.arange(total) // -(-total // DOCUMENTS) * -(-total // DOCUMENTS)
            batch = {"input_ids": ids, "labels": ids, "position_ids": (torch.arange(total) - starts)[None]}
        else:
            ids = torch.randint(VOCABULARY, (ROWS, sequence), generator=generator)
            lengths = torch.randint(sequence // 2, sequence + 1, (ROWS, 1), generator=generator)
            mask = (torch.arange(sequence) < lengths).long()
            batch = {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}
        yield {name: value.to(device) for name, value in batch.items()}


def step_of(
    model: Any, name: str, kind: str, accumulate: int, device: str, dtype: str = "fp32"
) -> Callable[[int], float]:
    """Return a model's training step: the sequence's length → mean loss."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer_of(trained, device) if name != "frozen" else None

    def step(sequence: int) -> float:
        total = 0.0
        for batch in batches(kind, sequence, accumulate, device):
            with torch.autocast(torch.device(device).type, DTYPES[dtype], enabled=dtype != "fp32"):
                loss = model(**batch, use_cache=False).loss / accumulate
            loss.backward()
            total += float(loss.detach())
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        return total

    return step


def optimizer_of(trained: list[Any], device: str) -> Any:
    """Return bitsandbytes' 8-bit AdamW, which pages on a GPU alone."""
    import bitsandbytes as bnb

    return getattr(bnb.optim, optimizer_name(device))(trained, lr=1e-4)


def optimizer_name(device: str) -> str:
    """Return its class."""
    return "PagedAdamW8bit" if device.startswith("cuda") else "AdamW8bit"


def measure(base: Any, method: str, checkpointing: str, kind: str, options: Any) -> list[dict[str, Any]]:
    """Return a row for each of the three: ms, over the frozen model and PEFT, peak, longest."""
    device = options.device
    made = models(base, method, checkpointing, options.rank)
    how = (kind, options.accumulate, device, options.dtype)
    steps = {name: step_of(model, name, *how) for name, model in made.items()}
    budget = Budget(seconds=0, least=options.rounds, most=options.rounds, warmup=1)
    runs = {name: partial(step, options.sequence) for name, step in steps.items()}
    times = {name: [ms for ms, _ in spent] for name, spent in rounds(runs, clock_of(device), budget).items()}
    medians = {name: statistics.median(spent) for name, spent in times.items()}
    rows: list[dict[str, Any]] = []
    for name in steps:
        row: dict[str, Any] = {"method": method, "checkpointing": checkpointing, "batches": kind, "impl": name}
        row |= {"blocks": options.blocks, "sequence": options.sequence, "rows": ROWS, "r": options.rank}
        row |= {"accumulate": options.accumulate, "dtype": options.dtype, "optimizer": optimizer_name(device)}
        over_peft = interval(lambda found, name=name: found[name] / found["peft"], times)  # type: ignore[misc]
        row |= {"median_ms": medians[name], "ratio_to_frozen": medians[name] / medians["frozen"]}
        row |= {"ratio_to_peft": over_peft[0], "peft_interval": over_peft[1:], "rounds": len(times[name])}
        row |= {"peak_mib": allocations(runs[name], device).peak / MIB, "limit_mib": options.limit_mib}
        row["longest_sequence"] = None
        if options.limit_mib is not None:
            # of two passes the second finds gradients there, as all that follow do
            short = step_of(made[name], name, kind, min(2, options.accumulate), device, options.dtype)
            first = rows[-1]["longest_sequence"] if rows else options.sequence
            row["longest_sequence"] = longest_within(options.limit_mib * MIB, partial(_peak, short, device), first)
        rows.append(row)
    return rows


def _peak(step: Callable[[int], float], device: str, sequence: int) -> int:
    return allocations(partial(step, sequence), device, warm=True).peak


def longest_within(limit: float, peak: Callable[[int], float], start: int, most: int = 2**17) -> int:
    """Return the longest multiple of GRANULE whose peak is within the limit; 0: none is.

    Peaks grow with the length and its square: the next to try is where a parabola through three of
    them meets the limit.

    Args:
        limit, peak: Bytes; length → bytes.
        start: The first length that is tried.
        most: The last one.
    """
    low, high = 0, most // GRANULE + 1
    found: dict[int, float] = {}
    at = min(max(1, start // GRANULE), high - 1)
    while high - low > 1:
        found[at] = peak(at * GRANULE)
        low, high = (at, high) if found[at] <= limit else (low, at)
        near = sorted(found, key=lambda length: abs(found[length] - limit))[:3]
        points = {length: found[length] for length in near} if len(found) > 1 else {0: 0.0, **found}
        end = high if high in found else max(2, 4 * low)
        fits = bisect_right(range(low, end), limit, key=partial(_through, points))
        at = min(max(low + fits - 1, low + 1), high - 1)
    return low * GRANULE


def _through(points: dict[int, float], at: int) -> float:
    """Return the value at `at` of the polynomial through `points`."""
    return sum(
        value * math.prod((at - other) / (length - other) for other in points if other != length)
        for length, value in points.items()
    )


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the rows as people read them."""
    shown = Table("method", "checkpointing", "batches", "model", "step, ms", "of frozen", "of PEFT's", "peak, MiB")
    limit = rows[0]["limit_mib"]
    if limit is not None:
        shown.add_column(f"longest in {limit} MiB")
    for row in rows:
        low, high = row["peft_interval"]
        ratio = f"{row['ratio_to_peft']:.2f} ({low:.2f} to {high:.2f})"
        what = (row["method"], row["checkpointing"], row["batches"], row["impl"])
        found = (f"{row['median_ms']:.0f}", f"{row['ratio_to_frozen']:.2f}", ratio, f"{row['peak_mib']:.1f}")
        shown.add_row(*what, *found, *([] if limit is None else [str(row["longest_sequence"])]))
    return shown


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, write the record; status 1 where bitsandbytes is not installed."""
    parser = parser_of(__doc__, rounds=5)
    add = parser.add_argument
    add("--checkpointing", choices=CHECKPOINTING, action="append", help="default: all three")
    add("--batches", choices=BATCHES, action="append", help="default: both")
    add("--dtype", choices=DTYPES, default="fp32", help="in which the base multiplies; default: fp32")
    add("--blocks", type=int, default=2, help="default: 2 (SmolLM2-135M has 30)")
    add("--hidden", type=int, default=576, help="default: 576")
    add("--intermediate", type=int, default=1536, help="default: 1536")
    add("--heads", type=int, default=9, help="a third of them for keys and values; default: 9")
    add("--sequence", type=int, default=128, help="tokens of a row; default: 128")
    add("--accumulate", type=int, default=4, help="passes of a step; default: 4")
    add("--rank", type=int, default=16, help="default: 16")
    add("--limit-mib", type=int, help="search for the longest sequence within these bytes beyond the model's")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        print(f"benchmarks.qlora_recipe: {error}; pip install 'delora-kernels[bnb]'", file=sys.stderr)
        return 1
    sizes = (options.hidden, options.intermediate, options.heads, options.blocks)
    base = four_bit_model(*sizes, options.dtype, options.device)
    rows: list[dict[str, Any]] = []
    for method in options.method or ("lora", "dora"):
        for checkpointing in options.checkpointing or CHECKPOINTING:
            for kind in options.batches or BATCHES:
                rows += measure(base, method, checkpointing, kind, options)
    Console().print(table(rows))
    write(rows, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
