"""The Megatron engine: decoders split over tensor, expert, pipeline and context ranks.

    engine.py      the contract: one step, evaluation, state
    layout.py      degrees -> process groups, configuration, layers of each stage
    block.py       the layer: what of ours Megatron-Core's transformer block is made of
    packs.py       a pack padded, and the part of it that a rank holds
    parts.py       what runs beside the layers: encoders, embedding, head, the Talker's front
    stages.py      a stretch of a decoder as a pipeline stage, with what comes before and after its layers
    weights.py     which ranges of the released tensors lie in a Megatron parameter
    cpu.py         what is replaced where there is no GPU, all of it

Megatron-Core's transformer block, dispatchers, schedules and distributed optimizer are used as they are. `megatron` is
imported by these files only, and they only once the engine is chosen.
"""
