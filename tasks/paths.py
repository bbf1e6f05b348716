"""Where each artifact of the chain lies, relative to the project's root (the current directory of every stage)."""

from pathlib import Path

PARAMS = Path("params.yaml")
LOCK = Path("requirements.lock")

RAW = Path("data/raw")

CORPUS = Path("data/corpus")
CORPUS_REPORT = CORPUS / "report.json"
QUARANTINE = CORPUS / "quarantine.parquet"

SHARDS = Path("data/shards")
MANIFEST = SHARDS / "manifest.json"
TOKENIZER = SHARDS / "tokenizer.json"

FLOAT = Path("models/float")
ADAPTER = FLOAT / "adapter"
TRAIN_REPORT = Path("models/train.json")
CURVE = Path("models/curve.csv")

INT8 = Path("models/int8")
INT8_GRAPH = INT8 / "model.onnx"
AUDIT = INT8 / "audit.json"
QUANTIZATION = INT8 / "quantization.json"
# What fine-tuning began with, for evaluate; nobody who writes with the model needs it.
POST_TRAINING = INT8 / "post_training"

INIT = Path("models/init")
INIT_RECORD = INIT / "init.json"

CHAMPION = Path("models/champion")
CHAMPION_RECORD = CHAMPION / "champion.json"

EVALUATION = Path("models/evaluation.json")
CARD = Path("models/card")

# Kept by Git with a version, and no part of its identity.
SPEED = Path("speed")

# Not tracked by DVC and not part of a version's identity.
SCRATCH = Path(".overnight")
CHECKPOINTS = SCRATCH / "checkpoints"
MEASUREMENTS = SCRATCH / "measurements"
