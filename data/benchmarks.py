"""The published evaluation sets that data.convert_sets knows; docs/datasets.md says what each asks and measures.

name --> suite, layout on disk, how it is opened, published numbers of samples
"""

from __future__ import annotations

from collections.abc import Mapping

from data import benchmark_films as films
from data import benchmark_pictures as pictures
from data import benchmark_speech as speech
from data import benchmark_text as text
from data.benchmark import Benchmark
from data.errors import DataError

_ALL = (
    Benchmark(
        "librispeech",
        "asr",
        "[LibriSpeech/]SPLIT/SPEAKER/CHAPTER/*.flac and SPEAKER-CHAPTER.trans.txt",
        speech.librispeech,
        {"dev-clean": 2703, "dev-other": 2864, "test-clean": 2620, "test-other": 2939},
        "OpenSLR 12",
    ),
    Benchmark(
        "fleurs",
        "asr",
        "[data/]LANGUAGE/SPLIT.tsv and LANGUAGE/audio/SPLIT/*.wav, or LANGUAGE/SPLIT*.parquet",
        speech.fleurs,
        {"test-en_us": 647, "test-cmn_hans_cn": 945},
        "google/fleurs",
        languages=True,
    ),
    Benchmark(
        "common_voice",
        "asr",
        "[cv-corpus-*/]LANGUAGE/SPLIT.tsv and LANGUAGE/clips/*.mp3",
        speech.common_voice,
        languages=True,
    ),
    Benchmark(
        "aishell1",
        "asr",
        "[data_aishell/]wav/SPLIT/SPEAKER/*.wav and transcript/aishell_transcript_v0.8.txt",
        speech.aishell1,
        {"train": 120_098, "dev": 14_326, "test": 7176},
        "Bu et al. 2017",
    ),
    Benchmark(
        "voicebench",
        "qa",
        "[data/]SUBSET/SPLIT-*.parquet of openbookqa, mmsu, sd-qa (the subsets that have references)",
        speech.voicebench,
        {"openbookqa-test": 455},
        "the authors' README",
    ),
    Benchmark(
        "mmau",
        "qa",
        "mmau-SPLIT.json (test-mini) and the recordings that it names",
        speech.mmau,
        {"test-mini": 1000, "test": 9000},
        "Sakshi et al. 2024",
    ),
    Benchmark(
        "gtzan",
        "qa",
        "[genres/ or genres_original/]GENRE/GENRE.00000.wav of ten genres",
        speech.gtzan,
        {"all": 1000},
        "Tzanetakis and Cook 2002",
    ),
    Benchmark(
        "clotho",
        "caption",
        "clotho_captions_SPLIT.csv (evaluation) and SPLIT/*.wav",
        speech.clotho,
        {"evaluation": 1045},
        "Drossos et al. 2020",
    ),
    Benchmark(
        "audiocaps",
        "caption",
        "[dataset/]SPLIT.csv (test) and [audio/]SPLIT/YOUTUBE_ID.wav",
        speech.audiocaps,
        {"test": 975},
        "the authors' repository",
    ),
    Benchmark(
        "mmmu",
        "vqa",
        "SUBJECT/SPLIT-*.parquet (validation)",
        pictures.mmmu,
        {"dev": 150, "validation": 900, "test": 10_500},
        "Yue et al. 2024",
    ),
    Benchmark(
        "mmmu_pro",
        "vqa",
        "standard (10 options)/test-*.parquet, vision/test-*.parquet",
        pictures.mmmu_pro,
        {"standard": 1730, "vision": 1730},
        "Yue et al. 2024, MMMU-Pro",
    ),
    Benchmark("mmstar", "vqa", "mmstar.parquet", pictures.mmstar, {"val": 1500}, "Chen et al. 2024"),
    Benchmark("ai2d", "vqa", "data/test-*.parquet of lmms-lab/ai2d", pictures.ai2d, {"test": 3088}, "lmms-lab/ai2d"),
    Benchmark(
        "chartqa",
        "vqa",
        "[ChartQA Dataset/]SPLIT/SPLIT_human.json, SPLIT_augmented.json and png/, or data/SPLIT-*.parquet",
        pictures.chartqa,
        {"test": 2500},
        "Masry et al. 2022",
    ),
    Benchmark(
        "textvqa",
        "vqa",
        "TextVQA_0.5.1_SPLIT.json (val) and train_images/*.jpg",
        pictures.textvqa,
        {"train": 34_602, "val": 5000},
        "Singh et al. 2019",
    ),
    Benchmark(
        "vqav2",
        "vqa",
        "v2_OpenEnded_mscoco_SPLIT2014_questions.json, v2_mscoco_SPLIT2014_annotations.json (val) and SPLIT2014/*.jpg",
        pictures.vqav2,
        {"train": 443_757, "val": 214_354},
        "visualqa.org",
    ),
    Benchmark(
        "mathvista",
        "vqa",
        "data/testmini-*.parquet",
        pictures.mathvista,
        {"testmini": 1000},
        "Lu et al. 2024",
    ),
    Benchmark(
        "mathvision",
        "vqa",
        "data/test-*.parquet, data/testmini-*.parquet",
        pictures.mathvision,
        {"test": 3040, "testmini": 304},
        "Wang et al. 2024",
    ),
    Benchmark(
        "hallusionbench",
        "qa",
        "HallusionBench.json and hallusion_bench/",
        pictures.hallusion,
        {"all": 1129},
        "Guan et al. 2024",
    ),
    Benchmark(
        "coco",
        "caption",
        "annotations/captions_SPLIT.json (val2014, val2017) and SPLIT/*.jpg",
        pictures.coco,
        {"val2014": 40_504, "val2017": 5000},
        "cocodataset.org",
    ),
    Benchmark(
        "coco_karpathy",
        "caption",
        "dataset_coco.json and val2014/*.jpg",
        pictures.karpathy,
        {"test": 5000},
        "Karpathy and Fei-Fei 2015",
    ),
    Benchmark(
        "videomme",
        "qa",
        "[videomme/]test-*.parquet and videos/ID.mp4 or data/ID.mp4",
        films.videomme,
        {"test": 2700},
        "Fu et al. 2024",
    ),
    Benchmark(
        "mlvu",
        "qa",
        "[MLVU/]json/1_plotQA.json to 7_topic_reasoning.json and video/TASK/*.mp4",
        films.mlvu,
        {"dev": 2174},
        "the authors' release, questions with choices",
    ),
    Benchmark(
        "lvbench",
        "long_qa",
        "[data/]video_info.meta.jsonl and all_videos/KEY.mp4 or videos/KEY.mp4",
        films.lvbench,
        {"test": 1549},
        "Wang et al. 2024, LVBench",
    ),
    Benchmark(
        "worldsense",
        "qa",
        "worldsense_qa.json and videos/ID.mp4",
        films.worldsense,
        {"test": 3172},
        "Hong et al. 2025",
        sound=True,
    ),
    Benchmark(
        "dailyomni",
        "qa",
        "qa.json and Videos/ID/ID_video.mp4",
        films.dailyomni,
        {"test": 1197},
        "Zhou et al. 2025",
        sound=True,
    ),
    Benchmark(
        "mmlu",
        "likelihood",
        "[data/]SPLIT/SUBJECT_SPLIT.csv of test and dev, or all/SPLIT-*.parquet",
        text.mmlu,
        {"test": 14_042},
        "Hendrycks et al. 2021",
    ),
    Benchmark(
        "mmlu_chat",
        "qa",
        "[data/]SPLIT/SUBJECT_SPLIT.csv, or all/SPLIT-*.parquet",
        text.mmlu_chat,
        {"test": 14_042},
        "Hendrycks et al. 2021",
    ),
    Benchmark(
        "gpqa",
        "qa",
        "[dataset/]gpqa_SPLIT.csv (diamond, main, extended)",
        text.gpqa,
        {"diamond": 198, "main": 448, "extended": 546},
        "Rein et al. 2023",
    ),
)
BENCHMARKS: Mapping[str, Benchmark] = {benchmark.name: benchmark for benchmark in _ALL}


def benchmark_named(name: str) -> Benchmark:
    """A set. Raises DataError with the names that there are."""
    if name not in BENCHMARKS:
        raise DataError(f"{name}: is no set that is known; there are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]
