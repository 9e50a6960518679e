//! For the requests of a recorded vLLM 0.32.0 the simulator publishes the recorded bytes.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use e2e::sim::api::{Endpoint, Served};
use e2e::sim::engine::{Engine, EngineOptions, Sampled};
use e2e::sim::event::{KvEvent, WireHash, encode_batch};
use e2e::sim::{Adapter, NewRequest};
use serde_json::{Value, json};

/// `[` of three, a float64: where the events begin in a payload, behind the timestamp.
const EVENTS_AT: usize = 10;

#[test]
fn events_equal_the_recording_in_the_repository() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/capture-vllm-0.32.0-sha256.jsonl");
    replay_capture(&path);
}

#[test]
fn events_equal_the_recordings_of_all_algorithms() {
    for name in ["sha256-int", "sha256_cbor-int", "sha256_cbor-bytes", "xxhash_cbor-int"] {
        let path = shared_capture(name);
        if path.exists() {
            replay_capture(&path);
        } else {
            // Not by `eprintln!`, whose output the test harness keeps to itself.
            let _ = writeln!(std::io::stderr(), "SKIPPED: no recording at {}", path.display());
        }
    }
}

fn shared_capture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../../shared/vllm/captures/{name}.jsonl"))
}

fn replay_capture(path: &Path) {
    let text = std::fs::read_to_string(path).unwrap();
    let mut lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let mut player = Player::new(&lines.next().unwrap());
    let mut n_scenarios = 0;
    for line in lines {
        player.play(&line);
        n_scenarios += 1;
    }
    assert!(n_scenarios > 40, "{} has only {n_scenarios} scenarios", path.display());
    assert!(player.next_seq > 30, "{} has only {} batches", path.display(), player.next_seq);
}

struct Player {
    engine: Engine,
    served: Served,
    wire_hash: WireHash,
    next_seq: u64,
}

impl Player {
    fn new(meta: &Value) -> Self {
        let options = EngineOptions {
            n_blocks: 16_384,
            block_size: u32::try_from(meta["block_size"].as_u64().unwrap()).unwrap(),
            max_model_len: 2048,
            algorithm: meta["algo"].as_str().unwrap().parse().unwrap(),
            seed: meta["pythonhashseed"].as_str().filter(|seed| *seed != "unset").map(str::to_owned),
            ..EngineOptions::default()
        };
        let wire_hash = if meta["wire_hash"] == "bytes" { WireHash::Bytes } else { WireHash::Int };
        let served = Served { model: "tiny".into(), adapters: Vec::new(), max_model_len: 2048 };
        let mut player = Self { engine: Engine::new(options).unwrap(), served, wire_hash, next_seq: 0 };
        player.load_adapter("lora-a", "model/lora-a");
        player
    }

    fn play(&mut self, line: &Value) {
        let name = line["name"].as_str().unwrap();
        let batches = match name {
            "concurrent_4" => self.concurrent(line),
            "reset_prefix_cache" => {
                assert!(self.engine.reset_prefix_cache());
                Vec::new()
            }
            "lora_load_b" => {
                let body = &line["request"]["body"];
                let [name, path] = ["lora_name", "lora_path"].map(|key| body[key].as_str().unwrap());
                self.load_adapter(name, path);
                Vec::new()
            }
            _ if line["prompt_token_ids"].is_array() => self.generate(line),
            _ if line["replay_request_frames"].is_array() => return self.check_replay(line),
            _ => Vec::new(),
        };
        self.check_frames(name, &batches, line["frames"].as_array().unwrap());
    }

    fn load_adapter(&mut self, name: &str, path: &str) {
        let id = u32::try_from(self.served.adapters.len()).unwrap() + 1;
        self.served.adapters.push(Adapter { id, name: name.into(), path: path.into() }.into());
    }

    /// Prompts of one request came to the recorded engine's steps together or one by one: that was up to chance.
    fn generate(&mut self, line: &Value) -> Vec<Vec<KvEvent>> {
        let mut body = line["request"]["body"].clone();
        let prompts = line["prompt_token_ids"].as_array().unwrap();
        let n_choices = body["n"].as_u64().unwrap_or(1) as usize;
        body["prompt"] = json!(prompts.iter().step_by(n_choices).collect::<Vec<_>>());
        let session = line["request"]["headers"]["X-Session-ID"].as_str();
        let mut request = self.served.generate(Endpoint::Completions, &body, session).unwrap();
        for (choice, new) in request.requests.iter_mut().enumerate() {
            new.output = token_ids(&line["response"]["choices"][choice]["token_ids"]);
        }
        let one_by_one = line["frames"].as_array().unwrap().len() >= prompts.len();
        let n_together = if one_by_one { 1 } else { prompts.len() };

        let mut batches = Vec::new();
        let mut n_cached = Vec::new();
        for requests in request.requests.chunks(n_together) {
            n_cached.extend(self.run(requests, &mut batches));
        }
        let last_choices = n_cached.iter().skip(n_choices - 1).step_by(n_choices);
        let recorded = &line["response"]["usage"]["prompt_tokens_details"]["cached_tokens"];
        assert_eq!(json!(last_choices.sum::<usize>()), *recorded, "{}", line["name"]);
        batches
    }

    /// Each at the step, and in the order, in which the recorded engine took it: that was up to chance.
    fn concurrent(&mut self, line: &Value) -> Vec<Vec<KvEvent>> {
        let bodies = line["request"].as_array().unwrap();
        let prompts: Vec<Vec<u32>> = bodies.iter().map(|body| token_ids(&body["prompt"])).collect();
        let mut batches = Vec::new();
        for frame in line["frames"].as_array().unwrap() {
            for event in frame["decoded"][1].as_array().unwrap() {
                let stored = token_ids(&event["token_ids"]);
                let prompt = prompts.iter().find(|prompt| prompt.starts_with(&stored)).unwrap().clone();
                self.engine.submit(NewRequest { prompt, output: vec![0; 4], ..NewRequest::default() });
            }
            self.step(&mut batches);
        }
        while self.step(&mut batches).is_some() {}
        batches
    }

    /// Runs `requests` to their end and returns their cached tokens.
    fn run(&mut self, requests: &[NewRequest], batches: &mut Vec<Vec<KvEvent>>) -> Vec<usize> {
        let ids: Vec<_> = requests.iter().map(|request| self.engine.submit(request.clone())).collect();
        let mut n_cached = BTreeMap::new();
        while let Some(sampled) = self.step(batches) {
            n_cached.extend(sampled.iter().map(|sampled| (sampled.id, sampled.n_cached)));
        }
        ids.iter().map(|id| n_cached[id]).collect()
    }

    fn step(&mut self, batches: &mut Vec<Vec<KvEvent>>) -> Option<Vec<Sampled>> {
        let step = self.engine.schedule()?;
        if !step.events.is_empty() {
            batches.push(step.events);
        }
        Some(self.engine.complete())
    }

    fn check_frames(&mut self, name: &str, batches: &[Vec<KvEvent>], frames: &[Value]) {
        assert_eq!(batches.len(), frames.len(), "{name}: number of batches");
        for (events, frame) in batches.iter().zip(frames) {
            let recorded = hex::decode(frame["payload_hex"].as_str().unwrap()).unwrap();
            let payload = encode_batch(0.0, events, 0, self.wire_hash);
            let (ours, theirs) = (hex::encode(&payload[EVENTS_AT..]), hex::encode(&recorded[EVENTS_AT..]));
            assert_eq!(ours, theirs, "{name}: events {events:?}");
            assert_eq!(format!("{:016x}", self.next_seq), frame["seq_hex"], "{name}: sequence number");
            self.next_seq += 1;
        }
    }

    /// Every batch from the first wanted one, and the end marker.
    fn check_replay(&self, line: &Value) {
        let start = u64::from_str_radix(line["replay_request_frames"][1].as_str().unwrap(), 16).unwrap();
        let n_replies = self.next_seq.saturating_sub(start) + 1;
        assert_eq!(line["replay_reply_count"], n_replies, "{}", line["name"]);
    }
}

fn token_ids(ids: &Value) -> Vec<u32> {
    serde_json::from_value(ids.clone()).unwrap()
}
