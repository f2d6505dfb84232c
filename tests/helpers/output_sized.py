"""How many tensors of a size torch's operations write."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Written(TorchDispatchMode):
    """Counts the tensors of `numel` elements that are not views of an operation's arguments."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.count = numel, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **kwargs or {})
        made = out if isinstance(out, tuple | list) else (out,)
        given = {each.untyped_storage().data_ptr() for each in args if isinstance(each, Tensor)}
        for each in made:
            if isinstance(each, Tensor) and each.numel() == self.numel:
                self.count += each.untyped_storage().data_ptr() not in given
        return out
