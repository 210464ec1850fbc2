"""A small GPT: logits of each next token from the tokens before it."""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class GPT(nn.Module):
    """Transformer that sees only what came before (Radford et al. 2019), normalized before layers.

    Positions are learned. With the defaults it has 0.47 million parameters.
    """

    def __init__(
        self,
        *,
        vocabulary: int = 256,
        context: int = 64,
        width: int = 128,
        layers: int = 2,
        heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        """Builds the layers and draws their weights.

        Args:
            vocabulary: Number of different tokens; 256 for bytes.
            context: The longest input in tokens.
            width: Units of a token's state.
            layers: Blocks of attention and a feed-forward network.
            heads: Attention heads, which share the width.
            dropout: Probability of dropping a unit of what a layer adds.

        Raises:
            ValueError: If the heads cannot share the width.
        """
        super().__init__()
        if min(vocabulary, context, layers, heads) < 1 or width < 1 or width % heads:
            raise ValueError(
                f"gpt got vocabulary={vocabulary}, context={context}, layers={layers},"
                f" width={width} and heads={heads}; allowed are 1 or more, and a width that is a"
                " multiple of heads."
            )
        self.context = context
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(_Block(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.apply(_draw)
        for name, weight in self.blocks.named_parameters():
            if name.endswith("out.weight"):  # what all layers add together keeps its size
                nn.init.normal_(weight, std=0.02 / (2 * layers) ** 0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of shape (batch, length, vocabulary) of tokens of shape (batch, length).

        Raises:
            ValueError: If the input is longer than the context.
        """
        length = tokens.shape[1]
        if length > self.context:
            raise ValueError(
                f"gpt got {length} tokens; allowed are {self.context}. Set model.context={length}."
            )
        positions = torch.arange(length, device=tokens.device)
        states = self.blocks(self.tokens(tokens) + self.positions(positions))
        logits: Tensor = self.head(self.norm(states))
        return logits


class _Block(nn.Module):
    """Attention, then a feed-forward network; each adds to the states."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.attention = _Attention(width, heads)
        self.norm_forward = nn.LayerNorm(width)
        self.forward_in = nn.Linear(width, 4 * width)
        self.forward_out = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: Tensor) -> Tensor:
        states = states + self.dropout(self.attention(self.norm_attention(states)))
        hidden = nn.functional.gelu(self.forward_in(self.norm_forward(states)))
        added: Tensor = states + self.dropout(self.forward_out(hidden))
        return added


class _Attention(nn.Module):
    """Every token looks at itself and those before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.inputs = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, states: Tensor) -> Tensor:
        split = self.inputs(states).unflatten(-1, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)  # each: batch, heads, length, share
        seen = scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.out(seen.transpose(1, 2).flatten(2))
        return out


def _draw(layer: nn.Module) -> None:
    if isinstance(layer, (nn.Linear, nn.Embedding)):
        nn.init.normal_(layer.weight, std=0.02)
    if isinstance(layer, nn.Linear) and layer.bias is not None:
        nn.init.zeros_(layer.bias)
