"""Records what a real vLLM says of the bodies of the corpus: DIR/corpus.jsonl.

usage: make_corpus.py DIR ...

Each DIR holds a tokenizer (`make_families.py`) and is named after its family. A vLLM server is started for it, asked `/tokenize` for every body,
and then asked to complete the body itself; the ids that the engine says it has computed must be the same. Run it with the interpreter
of the environment that the harness installs vLLM into.

A line is {"name", "path": "/tokenize", "request", "status", "tokens", "engine_path", "engine_status"}, with "openai" where the body that
the client sends is not the question itself. "tokens" is null when vLLM refuses the question.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import bodies

E2E = Path(__file__).parent.parent
VERSION = "0.32.0"
MAX_LEN = 16384
START_DEADLINE = 300


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("dirs", type=Path, nargs="+")
    args = parser.parse_args()
    for directory in args.dirs:
        with tempfile.TemporaryDirectory() as scratch:
            record(directory.resolve(), Path(scratch))


def record(directory, scratch):
    script = [sys.executable, E2E / "vllm/make_model.py", scratch / "model"]
    subprocess.run([*script, "--tokenizer", directory, "--max-len", str(MAX_LEN)], check=True)
    with Server(scratch) as server:
        lines, differences = observe(server, bodies.bodies(directory.name))
    if differences:
        raise SystemExit("\n".join(differences))
    text = "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines)
    (directory / "corpus.jsonl").write_text(text, encoding="utf-8", newline="\n")
    n_tokenized = sum(line["status"] == 200 for line in lines)
    n_equal = sum(line["status"] == line["engine_status"] == 200 for line in lines)
    print(f"{directory.name}: {len(lines)} bodies, {n_tokenized} tokenized, {n_equal} of them the same in the engine, {len(text)} characters")


def observe(server, drawn):
    """The lines, and in what the engine differs from them."""
    lines, differences = [], []
    for name, path, body in drawn:
        asked = bodies.question(path, body)
        status, answer = server.post("/tokenize", asked)
        tokens = answer["tokens"] if status == 200 else None
        engine_status, engine_tokens = computed(server, path, body)
        if engine_status == status == 200 and engine_tokens != tokens:
            differences.append(f"{name}: /tokenize says {tokens}, the engine {engine_tokens}, for {json.dumps(body)}")
        if engine_status != status:
            print(f"{name}: /tokenize {status}, {path} {engine_status}: {answer if status != 200 else engine_tokens}")
        line = {"name": name, "path": "/tokenize", "request": asked, "status": status, "tokens": tokens}
        line |= {"engine_path": path, "engine_status": engine_status}
        lines.append(line if body == asked else {**line, "openai": body})
    return lines, differences


def computed(server, path, body):
    """The status of the request itself, and the ids of the prompt that the engine computed, or what it says instead."""
    # Without a parser of tool calls the server takes no other choice than none; tools are rendered all the same.
    choice = {"tool_choice": "none"} if body.get("tools") else {}
    status, answer = server.post(path, {**body, **choice, "max_tokens": 1, "return_token_ids": True})
    if status != 200:
        return status, answer
    ids = answer["prompt_token_ids"] if path == bodies.CHAT else answer["choices"][0]["prompt_token_ids"]
    if path == bodies.CHAT and len(ids) != answer["usage"]["prompt_tokens"]:
        raise SystemExit(f"{len(ids)} ids, but the engine counts {answer['usage']}")
    return status, ids


class Server:
    """`vllm serve` on a free port, with the flags of the harness; its whole process group ends with the block."""

    def __init__(self, scratch):
        self.scratch = scratch
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

    def __enter__(self):
        command = [sys.executable, E2E / "vllm/serve.py", "serve", "model/tiny", "--served-model-name", bodies.MODEL]
        command += ["--load-format", "dummy", "--dtype", "float32", "--enforce-eager", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--block-size", "32", "--max-model-len", str(MAX_LEN), "--max-num-seqs", "8"]
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "VLLM_HOST_IP": "127.0.0.1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
        }
        log = open(self.scratch / "log", "wb")
        # serve.py ends the whole group as soon as our end of its standard input is closed.
        self.process = subprocess.Popen(
            command, cwd=self.scratch, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
        )
        try:
            self.wait_ready()
        except BaseException:
            self.__exit__()
            print((self.scratch / "log").read_text(errors="replace")[-5000:], file=sys.stderr)
            raise
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()

    def wait_ready(self):
        deadline = time.monotonic() + START_DEADLINE
        while self.process.poll() is None and time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/version", timeout=5) as answer:
                    version = json.load(answer)["version"]
                if version != VERSION:
                    raise SystemExit(f"version {version}, expected {VERSION}")
                return
            except OSError:
                time.sleep(0.5)
        raise SystemExit("vLLM does not start")

    def post(self, path, body):
        data = json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())


if __name__ == "__main__":
    main()
