"""Continue a text with onnxruntime, tokenizers and numpy. Run it in the folder that holds model.onnx."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

# Without one, the model begins a text of its own.
prompt = sys.argv[1] if len(sys.argv) > 1 else ""
options = onnxruntime.SessionOptions()
options.add_session_config_entry("session.x64quantprecision", "1")  # exact on x86 CPUs without VNNI too
session = onnxruntime.InferenceSession("model.onnx", options, providers=["CPUExecutionProvider"])
tokenizer = Tokenizer.from_file("tokenizer.json")
tokenizer.no_truncation()
tokenizer.no_padding()

config, told = (json.loads(Path(name).read_text()) for name in ("config.json", "generation_config.json"))
context = config["max_position_embeddings"]
ends = [config["bos_token_id"], *np.ravel(told.get("eos_token_id") or config["eos_token_id"])]
ids = [ends[0], *tokenizer.encode(prompt, add_special_tokens=False).ids]
# The caches of all layers, with room for the whole text.
room = {"batch": 1, "capacity": min(len(ids) + 40, context)}
cache = {
    x.name: np.zeros([room.get(axis, axis) for axis in x.shape], np.float32)
    for x in session.get_inputs()
    if x.name.startswith("past_")
}
outputs = ["logits", *(name.replace("past_", "present_") for name in cache)]
new = ids
random = np.random.default_rng(0)
if len(ids) >= context:
    sys.exit(f"The prompt has {len(ids)} tokens; the model reads at most {context}, its answer included.")

for _ in range(min(40, context - len(ids))):
    feed = {"input_ids": [new], "positions": [range(len(ids) - len(new), len(ids))], "logits_to_keep": [[len(new) - 1]]}
    logits, *presents = session.run(outputs, {name: np.array(x, np.int64) for name, x in feed.items()} | cache)
    cache = dict(zip(cache, presents, strict=True))
    best = np.argsort(-logits[0, -1])[:40]
    weights = np.exp((logits[0, -1][best] - logits[0, -1][best[0]]) / 0.8)
    token = int(random.choice(best, p=weights / weights.sum()))
    if token in ends:
        break
    new = [token]
    ids.append(token)

print(tokenizer.decode(ids))
