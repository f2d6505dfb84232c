"""EtherModel and EtherPlusModel: put layers of ETHER and ETHER+ into a model, as PEFT's
tuners do.
"""

from delora_kernels.integrations.peft.methods.base import LinearTuner
from delora_kernels.integrations.peft.methods.ether.layer import PeftEtherLinear, PeftEtherPlusLinear


class EtherModel(LinearTuner):
    """PEFT's tuner of ETHER: `get_peft_model` makes it.

    Args:
        model: The base model.
        config: An EtherConfig.
        adapter_name: Of the adapter.

    Raises:
        TypeError: a target is neither nn.Linear nor Transformers' Conv1D.
        ValueError: a layer's features can't be cut into n_blocks; the text names them and the
            remedy.
    """

    prefix = "ether_"
    tuner_layer_cls = PeftEtherLinear


class EtherPlusModel(LinearTuner):
    """PEFT's tuner of ETHER+, with an EtherPlusConfig; all else as in `EtherModel`."""

    prefix = "etherplus_"  # not one that begins with ETHER's: PEFT looks for it anywhere in a name
    tuner_layer_cls = PeftEtherPlusLinear
