"""Runs vLLM's command line, and ends the whole process group when the harness is gone.

The harness holds the other end of our standard input. However it ends, SIGKILL included, the pipe closes with it; without this watch the
engine's processes would live on and keep their memory. The harness starts us as leader of our own process group.
"""

import os
import signal
import sys
import threading


def end_with_harness():
    # Not sys.stdin: vLLM forks, and a child closing a buffered reader that this thread holds would wait forever.
    while os.read(0, 1):
        pass
    os.killpg(os.getpid(), signal.SIGKILL)


# vLLM's children import this file again under another name.
if __name__ == "__main__":
    threading.Thread(target=end_with_harness, daemon=True).start()
    from vllm.entrypoints.cli.main import main

    sys.exit(main())
