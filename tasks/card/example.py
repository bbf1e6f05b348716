"""Continue a text with onnxruntime, tokenizers and numpy. Run it in the folder that holds model.onnx."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

prompt = sys.argv[1] if len(sys.argv) > 1 else "And it came to pass"
options = onnxruntime.SessionOptions()
options.add_session_config_entry("session.x64quantprecision", "1")  # exact on x86 CPUs without VNNI too
session = onnxruntime.InferenceSession("model.onnx", options, providers=["CPUExecutionProvider"])
tokenizer = Tokenizer.from_file("tokenizer.json")

# One cache a layer, empty at first: [batch, tokens so far, width].
cache = {x.name: np.zeros((1, 0, x.shape[2]), np.float32) for x in session.get_inputs() if x.name.startswith("past_")}
outputs = ["logits", *(name.replace("past_", "present_") for name in cache)]
ids = tokenizer.encode(prompt).ids
end_of_text, new = ids[0], ids
random = np.random.default_rng(0)
context = json.loads(Path("config.json").read_text())["max_position_embeddings"]
if len(ids) >= context:
    sys.exit(f"The prompt has {len(ids)} tokens; the model reads at most {context}, its answer included.")

for _ in range(min(40, context - len(ids))):
    logits, *presents = session.run(outputs, {"input_ids": np.array([new], np.int64), **cache})
    cache = dict(zip(cache, presents, strict=True))
    best = np.argsort(-logits[0, -1])[:40]
    weights = np.exp((logits[0, -1][best] - logits[0, -1][best[0]]) / 0.8)
    token = int(random.choice(best, p=weights / weights.sum()))
    if token == end_of_text:
        break
    new = [token]
    ids.append(token)

print(tokenizer.decode(ids))
