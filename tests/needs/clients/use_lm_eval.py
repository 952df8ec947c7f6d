"""lm-eval's local-completions with the tokenizer of the server, on a task written here."""

import json
import os
import tempfile
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

url, model = os.environ["GREENROOM_URL"], os.environ["GREENROOM_MODEL"]
arguments = {
    "model": model,
    "base_url": url + "/v1/completions",
    "tokenizer_backend": "remote",
    "num_concurrent": 2,
    "max_retries": 1,
}
rows = [{"q": f"{n} plus one is", "choices": [str(n + 1), str(n + 5)], "a": 0} for n in range(4)]
with tempfile.TemporaryDirectory() as folder:
    data = Path(folder, "rows.jsonl")
    data.write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "plus_one",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "choices",
        "doc_to_target": "a",
        "metric_list": [{"metric": "acc"}],
    }
    found = lm_eval.simple_evaluate(
        "local-completions", model_args=arguments, tasks=[task], task_manager=TaskManager()
    )
accuracy = found["results"]["plus_one"]["acc,none"]
assert 0 <= accuracy <= 1
print(f"lm-eval: fine, accuracy {accuracy}")
