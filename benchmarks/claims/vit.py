"""A small vision transformer: eight tokens, the rows of an 8 x 8 image, through pre-norm blocks."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.claims.task import Split


class Block(nn.Module):
    """Attention and a feed-forward layer, each after a layer norm and beside a skip connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_feed_forward = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        z = self.before_attention(x)
        q, k, v = (
            each(z).unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (self.query, self.key, self.value)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.before_feed_forward(x))))


class VisionTransformer(nn.Module):
    """Images `[n, 8, 8]` to logits `[n, 10]`.

    Args:
        width: of the residual stream.
        blocks: how many.
        heads: of each attention.
    """

    def __init__(self, width: int = 64, blocks: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.row, self.position = nn.Linear(8, width), nn.Parameter(0.1 * torch.randn(8, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        z = self.row(x) + self.position
        for block in self.blocks:
            z = block(z)
        logits: Tensor = self.head(self.norm(z.mean(1)))
        return logits


def learn(model: nn.Module, data: Split, steps: int, lr: float, batch: int) -> None:
    """Train all of a model by AdamW, its rate falling to 0 along half a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(data.x), (batch,))
        optimizer.zero_grad()
        F.cross_entropy(model(data.x[rows]), data.y[rows]).backward()
        optimizer.step()
        schedule.step()
