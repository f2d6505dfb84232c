"""Why a layer as it stands does not run fused: its adapters, its surroundings, its base."""

from delora_kernels.diagnostics.reason import Reason

OF_LAYERS: tuple[Reason, ...] = (
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
        (
            "its LoRA variant {} is not fused",
            "its adapter is more than a pair of factors",
            "its LoRA variant {} is not fused beside {}",
            "its LoRA variant {} is not fused while dropout drops",
            "its LoRA variant {} is not fused before its first call",
            "its arrow router is a {}",
        ),
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
            "its lora_A is a {}",
            "its lora_B is a {}",
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
            "its embedding is split among devices",
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
            "its lora_diag is on another device than its base",
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
            "PEFT {} is {}: {} are not fused",
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
            "its base layer is not quantised yet, or its codes were taken away",
            "its codes are on the meta device, or not on one device",
            "its g_idx has {} elements for {} in-features",
            "its base layer has an adapter of GPTQModel's own",
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
        "bypassed",
        "the layer's parent computes it past its forward, by Unsloth's or axolotl's LoRA kernels",
        "choose one of the two: load the model without Unsloth, or set axolotl's lora_*_kernel to false",
        ("its parent's {} is {}, which computes it past its own forward",),
    ),
    Reason(
        "multihead-attention",
        "the layer is an `nn.MultiheadAttention`, or its output projection",
        "use an attention that calls its projections, each an `nn.Linear` (Transformers' and diffusers' do), or "
        "`merge_and_unload()` for inference",
        (
            "nn.MultiheadAttention reads the weights of its projections and calls none of them: PEFT puts adapters of "
            "the whole module into them for each call",
        ),
    ),
)
"""What is on the list stays; new ones go to its end."""
