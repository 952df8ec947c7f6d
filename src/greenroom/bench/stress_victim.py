"""A process that generates until it is killed; the stress test starts it and kills it.

Arguments: a GGUF file, and fields of EngineConfig as JSON. Writes a dot per token.
"""

import contextlib
import json
import sys

from greenroom.engine import LLM, SamplingParams
from greenroom.errors import ChatTemplateError


def main() -> None:
    """Never returns."""
    llm = LLM(sys.argv[1], **json.loads(sys.argv[2]))
    if llm.engine.chat is not None:  # so that a template's process is there to outlive this one
        with contextlib.suppress(ChatTemplateError):
            llm.engine.chat.render([{"role": "user", "content": "Hello"}])
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    while True:
        for _ in llm.stream([1], params):
            sys.stdout.write(".")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
