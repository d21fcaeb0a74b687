"""What the Talker's front keeps of a micro-batch: pieces beside those of train/activations.py.

text, hidden states, frames --inputs--> Talker's layers --hidden states--> residual codes of each frame
"""

from __future__ import annotations

from models.omni_config import CodePredictorConfig, TalkerConfig
from train.activations import Cut, Pack, Piece, norm, recomputed


def talker_front(
    config: TalkerConfig, pack: Pack, cut: Cut, max_logits: int, learns: bool
) -> tuple[Piece, list[Piece]]:
    """What makes the inputs of the Talker's first layer, and what predicts its frames' residual codes.

    Of `pack` the targets are frames. Weights are whole on each tensor rank; so are the inputs, of which the Talker
    reads its part. Frames are divided.
    """
    codes, size, hidden, wide = config.code_predictor, cut.size, config.text.hidden_size, config.thinker_hidden_size
    frames = pack.tokens if pack.targets is None else pack.targets
    groups, table = codes.num_code_groups, codes.vocab_size * hidden
    elements = 2 * (wide * wide + wide + wide * hidden + hidden) + config.text.vocab_size * hidden
    inputs = pack.tokens * (3 * wide + hidden) * size + frames * hidden * size
    front = Piece("head", inputs, frames * groups * hidden * size, inputs, elements + (groups - 1) * table)
    here = -(-frames // (cut.tp * cut.cp))
    rows = here * groups
    layer = _frame_layer(codes, rows, size)
    if cut.layers:
        layer = recomputed(layer, rows * hidden * size, rows * hidden * size)
    chunk = min(here, max(1, max_logits // codes.vocab_size)) * codes.vocab_size * (4 if size == 4 else 8)
    matrices = (groups - 1) * table
    states = rows * hidden * size  # what the heads read, and then the gradients of it, made in forward
    kept = states + (matrices * 4 if learns else 0)
    heads = Piece("head", kept, states, 2 * states, matrices, early=learns)
    logits = Piece("logits", 0, chunk + (table * size if learns and size < 4 else 0))
    return front, [*layer * codes.num_hidden_layers, norm(rows, hidden, size, "head", 0), heads, logits]


def _frame_layer(codes: CodePredictorConfig, rows: int, size: int) -> list[Piece]:
    """A layer of models/code_predictor.py on so many rows: attention, whose batch is the frames, and SwiGLU."""
    hidden, heads, inner = codes.hidden_size, codes.num_attention_heads, codes.intermediate_size
    pairs = codes.num_key_value_heads * codes.head_dim
    stream, query, pair = rows * hidden * size, rows * heads * codes.head_dim * size, rows * pairs * size
    scales, wide = rows * (heads + codes.num_key_value_heads) * 4, heads * codes.head_dim
    floats = 0 if size == 4 else 2 * query * 4 // size
    before = norm(rows, hidden, size, "head", stream)
    return [
        before,
        Piece("head", stream, 0, 3 * stream + query, hidden * (wide + 2 * pairs)),
        Piece("head", query + pair + scales, floats, stream + 3 * query + 2 * pair + floats, 2 * codes.head_dim),
        Piece("head", 2 * query + 2 * pair + rows * heads * 4, query, stream + 2 * query + 2 * pair),
        Piece("head", 0, 0, 2 * stream + query, hidden * wide),
        before,
        # by the time that both sides of the product have gradients, the product itself is gone
        Piece("head", stream + 4 * rows * inner * size, stream, stream + 2 * rows * inner * size, 3 * hidden * inner),
    ]
