"""Why a fused layer's call, or a backend's kernels, are left alone; and what is told of a model
before it is loaded.
"""

from delora_kernels.diagnostics.reason import Reason

OF_CALLS: tuple[Reason, ...] = (
    Reason(
        "call-arguments",
        "the layer is called with more than its input",
        "nothing: that call runs PEFT's own forward",
        (
            "it is called with {}",
            "it is called with {} adapter_names for an input of shape {}",
            "it is called with adapter_names while dropout drops",
            "it is called with adapter_names, and an adapter is more than A and B",
            "it is called with {} alora_offsets for an input of shape {}",
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
        "base-check-later",
        "before loading: the base will be stored in few bits, in a form that is read",
        "nothing: accelerate() compares its numbers, and then fuses it",
        ("its base will be {}, whose numbers are compared when it is loaded",),
    ),
    Reason(
        "base-own-forward",
        "before loading: the base will be stored in a form that is not read, or not in every kernel of it",
        "nothing: it will run its own forward, GPTQ's if another kernel than torch's is chosen; docs/stored-bases.md "
        "has the forms that are read",
        (
            "its base will be {}, which runs its own forward",
            "its base will be {}, which runs its own forward unless it is {}",
        ),
    ),
    Reason(
        "delora-on-stored-base",
        "before loading: PEFT's DeLoRA raises on a base in few bits",
        "call `dk.allow_delora_on_stored_bases()` first; there is nothing for forms that are not read",
        ("PEFT makes no DeLoRA layer on {}",),
    ),
    Reason(
        "convolution",
        "what an adapter does on this convolution or embedding is not fused",
        "nothing: PEFT's own forward runs it; LoRA of every kind runs fused, DoRA with one group",
        (
            "DoRA on a convolution with groups, whose norm PEFT takes in its own way",
            "DoRA whose lora_B has a bias",
            "its lora_B is more than a product",
            "its base layer is a {}, whose weight DoRA reads",
            "its embedding renormalises what it looks up (max_norm)",
        ),
    ),
    Reason(
        "experts-stored",
        "the experts' weights are stored in few bits, in a form that is not read or that is to train",
        "load them dense, or in 4 bits by `load_with_quantized_experts` (docs/experts.md)",
        (
            "its experts are stored in {} ({}), which is not read here: load it with "
            "quantization_config={}(dequantize=True), for 4 bits in load_with_quantized_experts",
            "its {} is stored in {} bits, and is to train",
            "its {} is torchao's {} of shape {} on {}",
            "its {} is torchao's {}, not read before it was traced: call accelerate(model) before",
            "its {} is torchao's {}, which {} too",
            "its {} is torchao's {}, {}",
        ),
    ),
    Reason(
        "dora-on-stored-base",
        "before loading: PEFT's DoRA raises on such a base",
        "train LoRA on it, or store the base otherwise; docs/stored-bases.md has the forms with DoRA",
        ("PEFT makes no DoRA layer on {}",),
    ),
    Reason(
        "another-library",
        "the adapter is not PEFT's: kohya-ss's, LyCORIS's, a module with low-rank factors of its own",
        "train with PEFT's layers (`add_adapter`, `get_peft_model`) to have them fused",
        ("it is computed by another library's adapter, {}: PEFT's alone are fused",),
    ),
)
"""What is on the list stays; new ones go to its end."""
