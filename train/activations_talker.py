"""What the Talker's front keeps of a micro-batch: pieces beside those of train/activations.py.

text, hidden states, frames --inputs--> Talker's layers --hidden states--> residual codes of each frame
"""

from __future__ import annotations

from models.omni_config import TalkerConfig
from train.activations import Cut, Pack, Piece, norm


def talker_front(
    config: TalkerConfig, pack: Pack, cut: Cut, max_logits: int, learns: bool
) -> tuple[Piece, list[Piece]]:
    """What makes the inputs of the Talker's first layer, and what predicts its frames' residual codes.

    Of `pack` the targets are frames. Weights are whole on each tensor rank; so are the inputs, of which the Talker
    reads its part. Frames are divided.
    """
    codes, size, hidden, wide = config.code_predictor, cut.size, config.text.hidden_size, config.thinker_hidden_size
    frames = pack.tokens if pack.targets is None else pack.targets
    groups, inner, table = codes.num_code_groups, codes.intermediate_size, codes.vocab_size * hidden
    elements = 2 * (wide * wide + wide + wide * hidden + hidden) + config.text.vocab_size * hidden
    inputs = pack.tokens * (3 * wide + hidden) * size + frames * hidden * size
    front = Piece("head", inputs, frames * groups * hidden * size, inputs, elements + (groups - 1) * table)
    here = -(-frames // (cut.tp * cut.cp))
    rows = here * groups
    queries, pairs = codes.num_attention_heads * codes.head_dim, codes.num_key_value_heads * codes.head_dim
    layer = Piece(
        "head",
        rows * (4 * hidden + 4 * queries + 3 * pairs + 4 * inner) * size + rows * (4 * codes.num_attention_heads + 16),
        rows * inner * size,
        rows * (2 * hidden + 3 * inner) * size,
        hidden * (2 * queries + 2 * pairs) + 2 * codes.head_dim + 3 * hidden * inner + 2 * hidden,
    )
    chunk = min(here, max(1, max_logits // codes.vocab_size)) * codes.vocab_size * (4 if size == 4 else 8)
    matrices = (groups - 1) * table
    kept = 2 * rows * hidden * size + (matrices * 4 if learns else 0)
    heads = Piece("head", kept, 0, 2 * rows * hidden * size, matrices, early=learns)
    logits = Piece("logits", 0, chunk + (table * size if learns and size < 4 else 0))
    return front, [*[layer] * codes.num_hidden_layers, norm(rows, hidden, size, "head", 0), heads, logits]
