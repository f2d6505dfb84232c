"""The codes of the reasons that reports and logs give: one list, which only grows.

A reason is a text for people, and its wording may change; what a program acts on is the code. The
list holds the texts as the code writes them, `{}` where something is put in; a text has the code of
the entry that spells out most of it.
"""

import re
from functools import cache
from typing import NamedTuple

OTHER = "other"
"""The code of a text that is not on the list: of a stored base's form of one's own."""


class Reason(NamedTuple):
    """One code.

    Args:
        code: The name, which never changes.
        when: What is so.
        do: What to do about it.
        texts: What is said of it.
    """

    code: str
    when: str
    do: str
    texts: tuple[str, ...]


REASONS: tuple[Reason, ...] = (
    Reason(
        "adapters-disabled",
        "the adapters are switched off",
        "nothing: the base runs alone; `enable_adapter_layers()` switches them on",
        ("its adapters are disabled",),
    ),
    Reason(
        "adapter-merged",
        "the adapter is in the base weight",
        "nothing for inference; `unmerge_adapter()` before training",
        ("its adapter is merged", "its adapters are disabled, and merged"),
    ),
    Reason(
        "no-active-adapter",
        "the layer has no adapter among the active ones",
        "nothing, or `set_adapter(name)`",
        ("it has no active adapter",),
    ),
    Reason(
        "several-adapters",
        "several adapters are active that do not add up to one",
        "activate one, or combine them by PEFT's `add_weighted_adapter`",
        (
            "it has {} active adapters, of which one runs with the base weight",
            "it has {} active adapters and one is DoRA, which rescales what the others gave",
        ),
    ),
    Reason(
        "lora-variant",
        "the adapter is a variant of LoRA with another equation",
        "nothing: PEFT's own forward runs it",
        ("its LoRA variant {} is not fused", "its adapter is more than a pair of factors"),
    ),
    Reason(
        "adapter-bias",
        "the adapter has a bias of its own",
        "take it away; `lora_bias=True` of PEFT's LoRA is none, it runs fused",
        ("its {} has a bias",),
    ),
    Reason(
        "input-cast-off",
        "PEFT was told not to cast the layer's input",
        "do not call `disable_input_dtype_casting`",
        ("the cast of its input is disabled",),
    ),
    Reason(
        "scaling",
        "the adapter's scaling is no finite number",
        "set a finite float",
        ("its scaling is a {}", "its scaling is not finite", "its scaling is not a finite number"),
    ),
    Reason(
        "dropout",
        "the adapter's dropout is not torch's, works in place or drops everything",
        "use `nn.Dropout` with p < 1, or none",
        (
            "its dropout is a {} that can't be fused",
            "its dropout writes into its input",
            "its dropout drops everything",
        ),
    ),
    Reason(
        "adapter-parts",
        "a part of the adapter is not what PEFT makes it",
        "look for what replaces it; restoring PEFT's part brings fusion back at the next call",
        (
            "its {} is kept in a {}",
            "its {} is a {}",
            "its magnitude is a {}",
            "its fan_in_fan_out is not that of its base",
            "its rank is not that of delora_A",
            "its delora_w_norm requires a gradient",
        ),
    ),
    Reason(
        "dora-cache",
        "PEFT keeps DoRA's norms between calls",
        "leave PEFT's DoRA caching off",
        ("PEFT's cache of DoRA norms is on",),
    ),
    Reason(
        "layer-class",
        "PEFT's layer is of a class that is not fused",
        "nothing: PEFT's own forward runs it; docs/versions.md and docs/stored-bases.md say what is fused",
        ("{} layers are not fused",),
    ),
    Reason(
        "patched",
        "somebody has replaced a forward that the layer calls (Unsloth, a quantisation library, a wrapper)",
        "choose one of the two: leave the patch out, or let it run",
        (
            "{}.{} has been replaced",
            "it has a forward of its own",
            "the {} has a forward of its own",
            "lora.layer.ParamWrapper.{} has been replaced",
            "the forward of its base layer's class has been replaced",
            "the forward of its base layer's class is not that of HQQ's backend",
        ),
    ),
    Reason(
        "hooks",
        "a module that the layer calls has hooks, or all modules have",
        "remove them; hooks on the adapter layer itself are no hindrance",
        ("the {} has hooks", "hooks are registered for all modules"),
    ),
    Reason(
        "base-class",
        "the base is no nn.Linear, no Conv1D and no form that is read",
        "nothing: it runs its own forward; `dk.bases.register` teaches a form of your own",
        ("the base layer is {}.{}, not nn.Linear or Transformers' Conv1D",),
    ),
    Reason(
        "no-plain-tensor",
        "a tensor is of a subclass, a layout or a dtype that is not read",
        "give it as a plain float tensor where that is possible",
        ("the {} is a {}", "the {} has dtype {}", "the {} has layout {}"),
    ),
    Reason(
        "sharded",
        "a tensor is in shards now",
        "nothing: a call that sees it whole runs fused",
        (
            "FSDP holds its weights in shards: calls see them whole, and decide then",
            "the {} is empty (sharded away, or a layer without features)",
            "the {} has no memory now (sharded away)",
            "its {} is {}-dimensional (sharded away)",
        ),
    ),
    Reason(
        "meta-device",
        "a tensor has no data yet",
        "load the weights; `dk.can_accelerate` judges a model without them",
        ("the {} is on the meta device", "its packed weight is on the meta device"),
    ),
    Reason(
        "device",
        "tensors of one layer are on different devices",
        "move the adapter to its base, the input to the layer",
        (
            "its {} is on another device than its base",
            "its {} is on another device than its base, or no matrix",
            "its {} are on another device",
            "its input is on another device",
            "its packed weight is on {}, its quant_state on {}",
            "its codes are on {}, its scales on {}",
        ),
    ),
    Reason(
        "peft-version",
        "the installed PEFT was not tested, and its layer differs or can't be checked",
        "install a tested PEFT (docs/versions.md)",
        (
            "PEFT {} is {}",
            "PEFT is {}",
            "{} and its {} layer differs: {}",
            "PEFT {} is {}: its layers on stored bases are not fused",
            "PEFT {} is {}: its factors of experts may be packed otherwise",
        ),
    ),
    Reason(
        "packed-weight-unreadable",
        "a weight in few bits is not quantised yet, or in a state that is not read",
        "move the model to its device, or load it again (docs/stored-bases.md)",
        (
            "its packed weight is a {}, not bitsandbytes' Params4bit (FSDP shards it?)",
            "its packed weight has no quant_state: it is not quantised yet (move the model to its device), or the "
            "state was lost (load the model again)",
            "its packed weight is of shape {}, not [out_features, in_features]",
            "its block scales are quantised in blocks of {}, not 256",
            "its base layer is not quantised yet",
            "its scales are quantised or offloaded themselves",
            "its torchao weight requires a gradient",
            "its torchao weight has shape {} on {}",
        ),
    ),
    Reason(
        "packed-weight-broken",
        "a weight in few bits was damaged; the layer refuses to run",
        "load the model again",
        (
            "its weight is packed for inference on this CPU, and its own forward has no gradient then: load the model "
            "again, and do not run it in eval() without gradients while its adapters are off",
            "its packed weight was stored as {} and is {} now: a cast has changed its bytes; load the model again, and "
            "cast no packed weight",
            "its packed weight has {} bytes where its {} weights take {}: it is a shard or another layer's; gather it, "
            "or load the model again",
        ),
    ),
    Reason(
        "base-quantises-input",
        "the base computes something else than x Wᵀ + bias of its dense weight",
        "nothing: it runs its own forward; a weight-only quantisation runs fused",
        (
            "its torchao weight quantises its input",
            "its torchao weight scales its input",
            "its forward is not x Wᵀ + bias of its dense form: it is off by {} where torch's linear is off by {} (it "
            "may quantise its input)",
        ),
    ),
    Reason(
        "base-not-compared",
        "a base's numeric check could not run while a program is traced",
        "call `accelerate(model)` before `torch.compile(model)`",
        ("it was not compared with its dense form before it was traced: call accelerate(model) before",),
    ),
    Reason(
        "base-check-raised",
        "a base's numeric check raised",
        "look at the error that it names",
        ("comparing its forward with its dense form raised {}: {}",),
    ),
    Reason(
        "experts-unknown",
        "the module of the experts is not one whose forward has been read",
        "nothing: PEFT's own forward runs it (docs/experts.md)",
        (
            "the module that holds its parameter is {}, no experts module of Transformers that is known",
            "its experts implementation is {}, which is not known",
            "the eager forward of {} is not known",
            "{} has a gate of its own, which its eager forward does not call",
        ),
    ),
    Reason(
        "experts-parametrized",
        "the experts' weights are parametrized",
        "load them in 16 bits and call `dk.quantize_experts`, or take the outer wrapper away",
        (
            "its weights are bitsandbytes' parametrizations: load them in 16 bits and call quantize_experts",
            "its module is parametrized (by a wrapper around it, which runs PEFT's own forward)",
        ),
    ),
    Reason(
        "experts-parameters",
        "the experts' weights or factors are not laid out as they are read",
        "adapt gate_up_proj and down_proj of all experts, each once",
        (
            "its parameter {} is wrapped twice",
            "its parameter {} is no weight of the experts",
            "its {} is stored in 4 bits, and is to train",
            "its {} is {}-dimensional",
            "its {} is of {} experts, of {}",
            "its in and out features are not those of its module",
            "its factors do not fit the experts' weights",
        ),
    ),
    Reason(
        "call-arguments",
        "the layer is called with more than its input",
        "nothing: that call runs PEFT's own forward",
        (
            "it is called with {}",
            "it is called with {} adapter_names for an input of shape {}",
            "it is called with adapter_names while dropout drops",
            "it is called with adapter_names, and an adapter is more than A and B",
        ),
    ),
    Reason(
        "input-kind",
        "the input is no plain tensor of the expected shape",
        "give the layer a plain, strided tensor",
        (
            "its input is a {}",
            "its input is nested",
            "its input has layout {}",
            "its input is one token without a dimension for it",
            "its input has no batch dimension",
            "its {} are a {}",
            "its {} are {}-dimensional",
            "its chosen experts and weights are not those of its hidden states",
        ),
    ),
    Reason(
        "input-dtype",
        "the input's dtype is not what the base multiplies in",
        "use autocast, or one dtype for both",
        (
            "its input is {}, its base {}",
            "its input is {} under autocast",
            "its input is {}, and its base multiplies in {}",
            "its input is {}, and HQQ's compute dtype {}",
        ),
    ),
    Reason(
        "transforms",
        "torch.func transforms or forward-mode differentiation are under way",
        "nothing: PEFT's own forward runs there",
        ("{} are under way",),
    ),
    Reason(
        "backend-not-here",
        "a backend can't run on this machine",
        "`python -m delora_kernels` says what is missing",
        (
            "triton is not installed",
            "there is no GPU (with TRITON_INTERPRET=1 its kernels run on CPU tensors, slowly, on request)",
            "there is no GPU, and there are no compiled kernels",
            "there is no GPU (the library loads: {})",
            "found {}; expected {}; to do: {}",
        ),
    ),
    Reason(
        "backend-not-for-cpu",
        "a backend's kernels run on a CPU for tests alone",
        "nothing: eager is the backend of a CPU",
        ("on a CPU its kernels are for tests: ask for them with use_backend({})",),
    ),
    Reason(
        "backend-limits",
        "the call is outside of what a backend's kernels take",
        "a smaller rank, another dtype or another device; else the next backend takes it",
        (
            "its tensors are on {}",
            "float64 has no fast units",
            "{} experts are more than {}",
            "rank {} is above {}",
            "the GPU is older than sm_80",
        ),
    ),
    Reason(
        "kernels-wrong",
        "a backend's kernels gave wrong numbers, or raised, when they proved themselves",
        "report it with the output of `python -m delora_kernels`; the next backend takes the calls",
        ("its kernels failed on {}: {}",),
    ),
    Reason(
        "kernels-unproved",
        "a backend's kernels could not prove themselves: no memory, a graph under capture, a backward pass",
        "call `dk.warmup(model)` before the first step",
        ("its kernels are not proved yet: {}",),
    ),
    Reason(
        "convolution",
        "what an adapter does on this convolution is not fused",
        "nothing: PEFT's own forward runs it; DoRA without dropout, or one group, runs fused",
        (
            "its convolution has groups",
            "lora_bias=True on a convolution",
            "its lora_B is more than a product",
            "DoRA's dropout runs a second convolution",
            "its base layer is a {}, whose weight DoRA reads",
        ),
    ),
)
"""Every code, in the order in which they came; what is on the list stays, new ones go to its
end.
"""


@cache
def code_of(text: str) -> str:
    """Return the code of a reason's text, or OTHER."""
    known = [(literal, code) for pattern, literal, code in _patterns() if pattern.fullmatch(text)]
    return max(known, default=(0, OTHER))[1]


@cache
def _patterns() -> tuple[tuple[re.Pattern[str], int, str], ...]:
    """Each text as a pattern, how many characters of it stand still, and its code."""
    texts = [(text, reason.code) for reason in REASONS for text in reason.texts]
    return tuple(
        (re.compile(".*".join(map(re.escape, text.split("{}"))), re.DOTALL), len(text.replace("{}", "")), code)
        for text, code in texts
    )


def as_markdown() -> str:
    """Return the list as docs/reasons.md shows it."""
    rows = [f"| `{reason.code}` | {reason.when} | {reason.do} |" for reason in REASONS]
    return "\n".join(["| code | when | what to do |", "| --- | --- | --- |", *rows])
