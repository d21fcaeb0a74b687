"""How many decoder layers each pipeline stage gets, so that no stage waits for another.

    encoders + layers | layers | layers | layers + head        costs in units of one decoder layer
    '---- stage 0 ---'                  '-- stage pp-1 -'

The step takes as long as its slowest stage. The encoders work on the first stage and the head on the last, so these
two get fewer layers. Interleaved, a rank has several chunks; chunks are then equal, and the order of layers is chunk
by chunk over all stages: chunk c is on stage c mod pp.

Cost: pp comparisons a layer, once.
"""

from __future__ import annotations

from models.audio_encoder import num_audio_tokens
from models.flops import audio_flops, text_flops, vision_flops
from train.errors import EngineError
from train.parallel import Model, first_layers, thinker_of

DOCUMENT = 4096  # tokens of a document, where attention is costed
SIDE = 32  # patches along an image's side


def stage_layers(
    num_layers: int,
    pp: int,
    interleave: int = 1,
    encoders: float = 0.0,
    head: float = 0.0,
    least_first: int = 1,
) -> list[int]:
    """Layers of each of the pp * interleave chunks in pipeline order; they sum to `num_layers`.

    With interleave = 1 the largest stage's cost is as small as can be, each stage has at least one layer and the first
    at least `least_first`. `encoders` and `head` are costs in layers. Raises EngineError where there are too few.
    """
    chunks = pp * interleave
    if interleave > 1:
        if num_layers % chunks:
            raise EngineError(f"engine.pp={pp} x engine.interleave={interleave} does not divide {num_layers} layers")
        if num_layers // chunks < least_first:
            raise EngineError(
                f"engine.pp={pp} x engine.interleave={interleave} leaves {num_layers // chunks} layers to the first "
                f"chunk, which needs {least_first}"
            )
        return [num_layers // chunks] * chunks
    counts = [max(1, least_first), *[1] * (pp - 1)]
    if sum(counts) > num_layers:
        raise EngineError(f"engine.pp={pp} needs {sum(counts)} layers, and the decoder has {num_layers}")
    costs = [float(count) for count in counts]
    costs[0] += encoders
    costs[-1] += head
    for _ in range(num_layers - sum(counts)):
        # the cheapest; the last of those, as early stages hold the activations of more micro-batches
        stage = min(range(pp), key=lambda place: (costs[place], -place))
        counts[stage] += 1
        costs[stage] += 1
    return counts


def stages_of(model: Model, pp: int, interleave: int = 1, media_share: float = 0.0) -> list[int]:
    """`stage_layers` of a model's Thinker."""
    layers = thinker_of(model).text.num_hidden_layers
    costs = encoder_layers(model, media_share), head_layers(model)
    return stage_layers(layers, pp, interleave, *costs, least_first=first_layers(model))


def encoder_layers(model: Model, media_share: float) -> float:
    """FLOPs of the encoders in units of one decoder layer on all tokens.

    `media_share` of the tokens are placeholders of media: half of sound and half of pictures, where the model sees.
    """
    thinker = thinker_of(model)
    window = thinker.audio.n_window_infer
    a_token = audio_flops(thinker.audio, [window]) / num_audio_tokens(window)
    if thinker.vision is not None:
        merge = thinker.vision.spatial_merge_size
        side = SIDE // merge * merge or merge
        seen = vision_flops(thinker.vision, [(1, side, side)]) / (side // merge) ** 2
        a_token = (a_token + seen) / 2
    return media_share * a_token / _layer(model)


def head_layers(model: Model) -> float:
    """FLOPs of the output head in units of one decoder layer."""
    text = thinker_of(model).text
    return 6 * text.hidden_size * text.vocab_size / _layer(model)


def _layer(model: Model) -> float:
    """FLOPs of one decoder layer per token, forward and backward."""
    text = thinker_of(model).text
    whole = text_flops(text, [DOCUMENT]) / DOCUMENT - 6 * text.hidden_size * text.vocab_size
    return whole / text.num_hidden_layers
