//! The whole of it, on tokenizers that are trained here.

use std::collections::BTreeMap;
use std::path::Path;

use proptest::prelude::*;
use serde_json::{Value as Json, json};
use tempfile::TempDir;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::models::unigram::{Unigram, UnigramTrainer};
use tokenizers::models::wordpiece::{WordPiece, WordPieceTrainer};
use tokenizers::models::{ModelWrapper, TrainerWrapper};
use tokenizers::normalizers::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, Tokenizer};

use super::template::ChatTemplate;
use super::*;

const TEXT: &str = "the quick brown fox jumps over the lazy dog; it's 42 o'clock and the router asks the engine for tokens. \
    naïve café, 日本語のテキスト, {\"city\": \"Paris\", \"days\": [1, 2, 3]} assistant user system tool";
const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}\
    {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
const LLAMA3: &str = "{{- bos_token }}\n{%- for message in messages %}\n    {{- '<|im_start|>' + message.role + '<|im_end|>\\n\\n' \
    + message['content'] | trim + '<|eot|>' }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n    \
    {{- '<|im_start|>assistant<|im_end|>\\n\\n' }}\n{%- endif %}\n";
const MISTRAL: &str = "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set rest = messages[1:] %}\
    {%- else %}{%- set rest = messages %}{%- endif %}{{ bos_token }}{%- for message in rest %}\
    {%- if message['role'] == 'user' %}{{ '<|im_start|> ' }}{%- if loop.first and system is defined %}{{ system + '\n\n' }}\
    {%- endif %}{{ message['content'] + '<|im_end|>' }}{%- else %}{{ ' ' + message['content'] | trim + '<|eot|>' }}{%- endif %}{%- endfor %}";
const QWEN: &str = "{%- if tools %}{{- '<|im_start|>system\n# Tools\n' }}{%- for tool in tools %}{{- tool | tojson ~ '\n' }}{%- endfor %}\
    {{- '<|im_end|>\n' }}{%- endif %}{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' }}\
    {%- if message.reasoning_content %}{{- '<think>' + message.reasoning_content + '</think>' }}{%- endif %}{{- message.content }}\
    {%- if message.tool_calls %}{%- for call in message.tool_calls %}{{- '<tool_call>' ~ call.function.name ~ ' ' }}\
    {{- call.function.arguments | tojson }}{%- endfor %}{%- endif %}{{- '<|im_end|>\n' }}{%- endfor %}\
    {%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- if enable_thinking is defined and enable_thinking is false %}\
    {{- '<think></think>' }}{%- endif %}{%- endif %}";

#[derive(Clone, Copy, Debug)]
enum Family {
    ByteLevelBpe,
    WordPiece,
    Unigram,
}

const FAMILIES: [(Family, &str); 6] = [
    (Family::ByteLevelBpe, CHATML),
    (Family::ByteLevelBpe, QWEN),
    (Family::Unigram, LLAMA3),
    (Family::Unigram, MISTRAL),
    (Family::WordPiece, CHATML),
    (Family::WordPiece, QWEN),
];

fn special_tokens() -> Vec<AddedToken> {
    ["<unk>", "<s>", "<|im_start|>", "<|im_end|>", "<|eot|>"].map(|token| AddedToken::from(token, true)).to_vec()
}

fn train(family: Family) -> Tokenizer {
    let special = special_tokens();
    let unknown = Some("<unk>".to_owned());
    let (model, mut trainer): (ModelWrapper, TrainerWrapper) = match family {
        Family::ByteLevelBpe => {
            let trainer = BpeTrainer::builder().vocab_size(600).special_tokens(special.clone());
            let trainer = trainer.initial_alphabet(ByteLevel::alphabet().into_iter().collect());
            (BPE::default().into(), trainer.build().into())
        }
        Family::WordPiece => {
            let model = WordPiece::builder().unk_token("<unk>".into()).build().expect("a model");
            (model.into(), WordPieceTrainer::builder().vocab_size(300).special_tokens(special.clone()).build().into())
        }
        Family::Unigram => {
            let mut trainer = UnigramTrainer::builder();
            trainer.vocab_size(150).special_tokens(special.clone()).unk_token(unknown).show_progress(false);
            (Unigram::default().into(), trainer.build().expect("a trainer").into())
        }
    };
    let mut tokenizer = Tokenizer::new(model);
    match family {
        Family::ByteLevelBpe => {
            tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
        }
        Family::WordPiece => {
            tokenizer.with_normalizer(Some(BertNormalizer::default())).expect("a normalizer");
            tokenizer.with_pre_tokenizer(Some(BertPreTokenizer));
        }
        Family::Unigram => {
            tokenizer.with_pre_tokenizer(Some(Metaspace::new('▁', PrependScheme::First, true)));
        }
    }
    let texts = [TEXT, &TEXT.to_uppercase()];
    tokenizer.train(&mut trainer, texts.iter().map(|text| (*text).to_owned())).expect("trained");
    let bos = tokenizer.token_to_id("<s>").expect("known");
    let post = TemplateProcessing::builder()
        .try_single("<s> $0")
        .expect("a template")
        .special_tokens(vec![("<s>", bos)])
        .build()
        .expect("a processor");
    tokenizer.with_post_processor(Some(post));
    tokenizer
}

/// A directory with a trained tokenizer and these other files.
fn directory(family: Family, files: &[(&str, &str)]) -> TempDir {
    let directory = tempfile::tempdir().expect("a directory");
    train(family).save(directory.path().join("tokenizer.json"), false).expect("written");
    for (name, content) in files {
        let path = directory.path().join(name);
        std::fs::create_dir_all(path.parent().expect("a parent")).expect("made");
        std::fs::write(path, content).expect("written");
    }
    directory
}

fn load(family: Family, template: &str) -> LocalTokenizer {
    let config = json!({"bos_token": "<s>", "eos_token": {"content": "<|eot|>"}, "model_max_length": 1e30}).to_string();
    let directory = directory(family, &[("tokenizer_config.json", &config), ("chat_template.jinja", template)]);
    LocalTokenizer::load(directory.path()).expect("loaded")
}

fn ask(body: &Json) -> Question {
    Question { api: TokensApi::Tokenize, body: body.to_string().into_bytes() }
}

/// The text that is tokenized for a chat.
fn text(tokenizer: &LocalTokenizer, body: &Json) -> Result<String, Unsupported> {
    match Ask::read(body.to_string().as_bytes())? {
        Ask::Chat(chat) => tokenizer.render(chat),
        Ask::Text { prompt, .. } => Ok(prompt),
    }
}

/// The tokens of the whole text.
fn whole(tokenizer: &LocalTokenizer, body: &Json) -> Vec<u32> {
    let text = text(tokenizer, body).expect("rendered");
    tokenizer.tokenizer.encode(text, false).expect("tokenized").get_ids().to_vec()
}

fn turn(at: usize) -> [Json; 2] {
    let question = format!("Question {at}: {} And what of {at}?", TEXT.repeat(2 + at % 3));
    let answer = format!(" The answer to {at} is\n\n{}  ", "yes, 日本語 it's. ".repeat(10 + at));
    [json!({"role": "user", "content": question}), json!({"role": "assistant", "content": answer})]
}

#[test]
fn every_turn_of_a_conversation_has_the_tokens_of_the_whole_text_and_reuses_the_turns_before() {
    for (family, template) in FAMILIES {
        let tokenizer = load(family, template);
        assert!(tokenizer.status().conversations.is_possible, "{family:?}");
        let mut messages = vec![json!({"role": "system", "content": TEXT.repeat(3)})];
        let mut n_before = 0;
        for at in 0..20 {
            let [question, answer] = turn(at);
            messages.push(question);
            let body = json!({"messages": messages});
            let tokens = tokenizer.tokenize(&ask(&body)).expect("tokenized");
            assert_eq!(tokens.ids, whole(&tokenizer, &body), "{family:?} turn {at}");
            if at > 0 {
                assert!(tokens.reused * 10 >= n_before * 9, "{family:?} turn {at}: {} of {n_before}", tokens.reused);
            }
            n_before = tokens.ids.len();
            messages.push(answer);
        }
        let status = tokenizer.status().conversations;
        assert_eq!((status.hits, status.misses, status.is_disabled), (19, 1, false), "{family:?}");
    }
}

/// An edit of a conversation.
#[derive(Clone, Debug)]
enum Edit {
    Say(String),
    Change(usize, String),
    Drop(usize),
    Keep(usize),
    Tools(usize),
}

fn edits() -> impl Strategy<Value = Vec<Edit>> {
    let words = "(hello|  |\n|<\\|im_end\\|>|<\\|im_|日本|é|\\.|<s>|x|[0-9]| it's|user\n|the quick brown fox ){0,80}";
    let edit = prop_oneof![
        4 => words.prop_map(Edit::Say),
        2 => (any::<usize>(), words).prop_map(|(at, text)| Edit::Change(at, text)),
        1 => any::<usize>().prop_map(Edit::Drop),
        1 => any::<usize>().prop_map(Edit::Keep),
        1 => (0_usize..3).prop_map(Edit::Tools),
    ];
    proptest::collection::vec(edit, 1..16)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn edited_conversations_have_the_tokens_of_the_whole_text(which in 0..FAMILIES.len(), edits in edits()) {
        thread_local! {
            static LOADED: [LocalTokenizer; 6] = FAMILIES.map(|(family, template)| load(family, template));
        }
        LOADED.with(|tokenizers| {
            let tokenizer = &tokenizers[which];
            let mut messages = vec![json!({"role": "system", "content": TEXT})];
            let mut tools = 0;
            for edit in edits {
                match edit {
                    Edit::Say(text) => {
                        let role = if messages.len() % 2 == 1 { "user" } else { "assistant" };
                        messages.push(json!({"role": role, "content": text}));
                    }
                    Edit::Change(at, text) => {
                        let at = at % messages.len();
                        messages[at]["content"] = json!(text);
                    }
                    Edit::Drop(at) if messages.len() > 1 => drop(messages.remove(at % messages.len())),
                    Edit::Drop(_) => {}
                    Edit::Keep(n) => messages.truncate(1 + n % messages.len()),
                    Edit::Tools(n) => tools = n,
                }
                let tool = json!({"type": "function", "function": {"name": "f", "description": TEXT}});
                let body = json!({"messages": messages, "tools": vec![tool; tools]});
                let tokens = tokenizer.tokenize(&ask(&body)).expect("tokenized");
                prop_assert_eq!(tokens.ids, whole(tokenizer, &body));
            }
            prop_assert!(!tokenizer.status().conversations.is_disabled);
            Ok(())
        })?;
    }
}

#[test]
fn a_wrong_part_is_found_by_an_audit_and_ends_all_reuse() {
    let tokenizer = load(Family::ByteLevelBpe, CHATML);
    let body = json!({"messages": ([turn(0), turn(1)].concat())});
    let expected = whole(&tokenizer, &body);
    assert_eq!(tokenizer.tokenize(&ask(&body)).expect("tokenized").ids, expected);
    assert!(!tokenizer.is_doubted());
    tokenizer.conversations.as_ref().expect("possible").spoil();

    assert_eq!(tokenizer.tokenize(&ask(&body)).expect("tokenized"), LocalTokens { ids: expected.clone(), reused: 0 });
    let status = tokenizer.status().conversations;
    assert_eq!((status.is_disabled, status.audits, status.bytes), (true, 1, 0));
    assert!(tokenizer.is_doubted());
    assert_eq!(tokenizer.tokenize(&ask(&body)).expect("tokenized"), LocalTokens { ids: expected, reused: 0 });
}

#[test]
fn what_is_kept_is_bounded() {
    let tokenizer = load(Family::ByteLevelBpe, CHATML);
    let mut conversations = tokenizer.conversations.expect("possible");
    conversations.set_capacity(200_000);
    for at in 0..200 {
        let body = format!("{at}{}<|im_end|>", TEXT.repeat(20));
        conversations.tokenize(&tokenizer.tokenizer, &body).expect("tokenized");
    }
    let bytes = conversations.status().bytes;
    assert!((1_000..=200_000).contains(&bytes), "{bytes}");
}

#[test]
fn a_token_that_depends_on_what_follows_it_is_no_boundary() {
    let mut tokenizer = train(Family::ByteLevelBpe);
    let special = |content: &str| AddedToken::from(content, true);
    tokenizer
        .add_tokens([
            special("<a>"),
            special("<a><b>"),
            special("<c>").lstrip(true),
            special("<d>").rstrip(true),
            special("<e>").single_word(true),
            special("<f>").normalized(true),
            AddedToken::from("<g>", false).normalized(false),
            special("<h> "),
            special("x<i>y"),
            special("<i>"),
            special("-<j>"),
            special("<j>"),
        ])
        .expect("added");
    let boundaries = conversation::boundary_texts(&tokenizer);
    let expected = ["<unk>", "<s>", "<|im_start|>", "<|im_end|>", "<|eot|>", "<a><b>", "x<i>y", "-<j>", "<j>"];
    assert_eq!(boundaries, expected);
}

#[test]
fn the_token_for_unknown_characters_is_no_boundary() {
    for (family, is_boundary) in [(Family::Unigram, false), (Family::WordPiece, false), (Family::ByteLevelBpe, true)] {
        let boundaries = conversation::boundary_texts(&train(family));
        assert_eq!(boundaries.contains(&"<unk>".to_owned()), is_boundary, "{family:?}");
        assert!(boundaries.contains(&"<|im_end|>".to_owned()), "{family:?}");
    }
}

#[test]
fn a_tokenizer_whose_parts_depend_on_each_other_is_never_cut() {
    let mut tokenizer = train(Family::ByteLevelBpe);
    // The special tokens are only added tokens if the text is split at them.
    tokenizer.set_encode_special_tokens(true);
    assert!(Conversations::new(&tokenizer).is_none());
}

#[test]
fn tokens_around_a_prompt_are_put_around_reused_ones_too() {
    let tokenizer = load(Family::Unigram, CHATML);
    let prompt = format!("{}<|im_end|>{}", TEXT.repeat(4), TEXT);
    for _ in 0..2 {
        let tokens = tokenizer.tokenize(&ask(&json!({"prompt": prompt}))).expect("tokenized");
        assert_eq!(tokens.ids, tokenizer.tokenizer.encode(prompt.as_str(), true).expect("tokenized").get_ids());
        let bare =
            tokenizer.tokenize(&ask(&json!({"prompt": prompt, "add_special_tokens": false}))).expect("tokenized");
        assert_eq!(bare.ids, tokens.ids[1..]);
        assert!(bare.reused > 0);
    }
}

#[test]
fn chats_are_rendered_as_by_transformers() {
    let user = json!({"role": "user", "content": "Hi"});
    let call = json!({"type": "function", "index": 0, "id": "c", "function": {"name": "f", "arguments": "{\"b\": 1.0, \"a\": \"é\"}"}});
    let tool = json!({"function": {"parameters": {"a": null, "z": 1}, "name": "f", "x": 1}});
    let cases: BTreeMap<&str, (&str, Json, &str)> = BTreeMap::from([
        ("plain", (CHATML, json!({"messages": [user]}), "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")),
        (
            "continued",
            (
                CHATML,
                json!({"messages": [user, {"role": "assistant", "content": "Well, "}], "add_generation_prompt": false,
                    "continue_final_message": true}),
                "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nWell, ",
            ),
        ),
        (
            "trimmed and continued",
            (
                LLAMA3,
                json!({"messages": [{"role": "assistant", "content": "Well, "}], "add_generation_prompt": false,
                    "continue_final_message": true}),
                "<s><|im_start|>assistant<|im_end|>\n\nWell,",
            ),
        ),
        (
            "tools and calls",
            (
                QWEN,
                json!({"messages": [user, {"role": "assistant", "content": null, "reasoning": "r", "tool_calls": [call]}], "tools": [tool],
                    "chat_template_kwargs": {"enable_thinking": false}}),
                "<|im_start|>system\n# Tools\n{\"type\": \"function\", \"function\": {\"name\": \"f\", \"description\": null, \
                 \"parameters\": {\"a\": null, \"z\": 1}}}\n<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n\
                 <think>r</think><tool_call>f {\"b\": 1.0, \"a\": \"é\"}<|im_end|>\n<|im_start|>assistant\n<think></think>",
            ),
        ),
        (
            "parts, developer and a changing header",
            (
                CHATML,
                json!({"messages": [
                    {"role": "system", "content": "x-anthropic-billing-header: 1\nBe kind."},
                    {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": ""}, {"type": "refusal", "refusal": "b"}]},
                    {"role": "assistant"},
                ]}),
                "<|im_start|>system\nBe kind.\n\na\nb<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n<|im_start|>assistant\n",
            ),
        ),
        (
            "content as parts",
            (
                "{% for m in messages %}{% for part in m.content %}{{ part | tojson }}{% endfor %}{{ m.name }}{% endfor %}",
                json!({"messages": [{"role": "user", "name": "n", "content": [{"type": "text", "text": "a", "k": 1}, "b"]}]}),
                "{\"type\": \"text\", \"text\": \"a\", \"k\": 1}{\"type\": \"text\", \"text\": \"b\"}n",
            ),
        ),
        (
            "the language",
            (
                "{%- macro m(a, b='x') -%}[{{a}}{{b}}{{ caller() if caller }}]{%- endmacro -%}{{ m('q') }}{% call m('z') %}body\
                 {% endcall %}{% set ns = namespace(a=1) %}{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}\
                 {% set ns.a = ns.a + i %}{{ loop.index }}{% endfor %}{{ ns.a }}{% generation %}\n  g{% endgeneration %}\
                 {% set d = {'items': 1, 'b': none} %}{% for k, v in d.items() %}{{k}}={{v}};{% endfor %}{{ d['items'] }}{{ d.get('zz') }}\
                 {{ ' a  b '.split(' ')|join('/') }}|{{ 'é<'|tojson(ensure_ascii=True) }}|{{ -7 // 2 }}|{{ 7 % -3 }}|{{ 'abc'[::-1] }}\
                 |{{ 'ab'.title() ~ none ~ true }}|{{ messages[0]|tojson(separators=(',',':'), sort_keys=true) }}|{{ tools }}",
                json!({"messages": [user]}),
                "[qx][zxbody]133  gitems=1;b=None;1None/a//b/|\"\\u00e9<\"|-4|-2|cba|AbNoneTrue|{\"content\":\"Hi\",\"role\":\"user\"}|None",
            ),
        ),
    ]);
    for (name, (template, body, expected)) in cases {
        assert_eq!(text(&load(Family::ByteLevelBpe, template), &body).as_deref(), Ok(expected), "{name}");
    }
}

#[test]
fn what_is_not_known_exactly_is_left_to_the_engine() {
    let tokenizer = load(Family::ByteLevelBpe, QWEN);
    let message = |message: Json| json!({"messages": [message]});
    let with = |mut body: Json, field: &str, value: Json| {
        body[field] = value;
        body
    };
    let plain = message(json!({"role": "user", "content": "Hi"}));
    let call = |call: Json| message(json!({"role": "assistant", "content": "x", "tool_calls": [call]}));
    for body in [
        json!({}),
        json!([]),
        json!({"messages": []}),
        json!({"prompt": [1, 2]}),
        json!({"prompt": "a", "messages": []}),
        message(json!({"role": "user"})["role"].clone()),
        message(json!({"content": "x"})),
        message(json!({"role": "user", "content": null})),
        message(json!({"role": "user", "content": 1})),
        message(json!({"role": "user", "content": "x\u{1d}"})),
        message(json!({"role": "user", "content": "x", "name": null})),
        message(json!({"role": "user", "content": ["x"]})),
        message(json!({"role": "user", "content": [{"text": "x"}]})),
        message(json!({"role": "user", "content": [{"type": "text", "text": "x", "uuid": "u"}]})),
        message(json!({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]})),
        message(json!({"role": "assistant", "content": null, "tool_calls": null})),
        message(json!({"role": "assistant", "content": "x", "reasoning": 1})),
        call(json!({"id": "x", "type": "function", "function": {"name": "f", "arguments": {}}})),
        call(json!({"id": "x", "type": "custom", "custom": {"name": "f", "input": ""}})),
        call(json!({"id": "x", "type": "function", "function": {"name": "f", "arguments": "{\"a\": NaN}"}})),
        with(plain.clone(), "continue_final_message", json!(true)),
        with(plain.clone(), "chat_template", json!("x")),
        with(plain.clone(), "tools", json!([{"type": "web_search"}])),
        with(plain.clone(), "chat_template_kwargs", json!({"tokenize": true})),
        with(plain.clone(), "chat_template_kwargs", json!({"messages": []})),
        with(plain.clone(), "chat_template_kwargs", json!({"range": 1})),
        with(plain.clone(), "add_generation_prompt", json!("yes")),
    ] {
        assert!(tokenizer.tokenize(&ask(&body)).is_err(), "{body}");
    }
    assert!(tokenizer.tokenize(&ask(&plain)).is_ok());
}

/// What Jinja2 3.1 in Python 3.11 prints for an argument `x` of a template; none where it fails or where that is not
/// followed.
#[test]
fn values_of_clients_become_the_text_that_python_makes_of_them() {
    let tilde = "{{ 'a' ~ x }}";
    let string = "{{ x | string }}";
    let join = "{{ [x, 1] | join('/') }}";
    let sequence = "{{ x is sequence }} {{ x is iterable }}";
    for (template, x, expected) in [
        (tilde, json!(1e-5), Some("a1e-05")),
        (tilde, json!(1e22), Some("a1e+22")),
        (tilde, json!(0.5), Some("a0.5")),
        (tilde, json!(true), Some("aTrue")),
        (tilde, json!([1]), None),
        (tilde, json!({"a": 1}), None),
        ("{{ x.y ~ x['z'] ~ (x.y if x.z else x.q) }}", json!({"y": 1e16, "z": "b"}), Some("1e+16b1e+16")),
        ("{{ 'a' ~ (x.y + 1) }}", json!({"y": [1]}), None),
        ("{{ 'a' ~ (x or 'é') ~ 'b' }}", json!([1]), None),
        ("{{ ('é' ~ x)|length ~ x|list }}", json!("b"), None),
        (string, json!(1e22), Some("1e+22")),
        (string, json!(-0.0001), Some("-0.0001")),
        (string, json!({"a": 1}), None),
        (string, json!([]), None),
        (join, json!(1e-5), Some("1e-05/1")),
        (join, json!({"a": 1}), None),
        ("{{ '/'.join([x]) }}", json!("b"), Some("b")),
        ("{{ '/'.join([x]) }}", json!(1), None),
        ("{{ '{}'.format(x) }}", json!(1), None),
        ("{{ x }}", json!(1e22), Some("1e+22")),
        ("{{ x }}", json!([1]), None),
        (sequence, json!("b"), Some("True True")),
        (sequence, json!({"a": 1}), Some("True True")),
        (sequence, json!(1), Some("False False")),
        ("{{ x | e }}", json!("<"), None),
        ("{{ x | upper }}", json!("aß"), None),
        ("{{ x | upper }}", json!("ab"), Some("AB")),
        ("{{ x.title() }}", json!("it's"), Some("It'S")),
        ("{{ x.isdigit() }}", json!("²"), None),
        ("{{ x.isdigit() }}", json!("42"), Some("True")),
        ("{{ x.splitlines() | length }}", json!("a\rb"), None),
        ("{{ x.splitlines() | length }}", json!("a\nb"), Some("2")),
        ("{{ x | indent }}", json!("a"), None),
        ("{{ x | default('b', boolean=false) }}", json!(""), Some("")),
        ("{{ x | tojson | safe if x is mapping else x | string }}", json!({"a": 1e22}), Some("{\"a\": 1e+22}")),
        ("{{ '<' + (x | safe) }}", json!("b"), None),
        ("{{ '<' + x }}{{ x | safe }}", json!("b"), Some("<bb")),
        ("{% generation %}{% set x = 'c' %}{{ x }}{% endgeneration %}{{ x }}", json!("b"), Some("cb")),
        ("{{ x | trim }}", json!("\u{1f}b"), None),
    ] {
        let body = json!({"messages": [{"role": "user", "content": "Hi"}], "chat_template_kwargs": {"x": x}});
        let template = ChatTemplate::new(template).map_err(|error| error.to_string()).and_then(|template| {
            let Ok(Ask::Chat(chat)) = Ask::read(body.to_string().as_bytes()) else { panic!("a chat") };
            let input = chat.into_input(template.format(), false).map_err(|error| error.to_string())?;
            template.render(input, &[]).map_err(|error| error.to_string())
        });
        assert_eq!(template.as_deref().ok(), expected, "{body}: {template:?}");
    }
}

#[test]
fn characters_that_python_strips_are_found_wherever_they_come_from() {
    let tokenizer = load(Family::ByteLevelBpe, QWEN);
    let user = "{\"role\": \"user\", \"content\": \"Hi\"}";
    let call = |arguments: &str| {
        format!(
            "{{\"messages\": [{user}, {{\"role\": \"assistant\", \"content\": \"x\", \"tool_calls\": [{{\"id\": \"c\", \
             \"type\": \"function\", \"function\": {{\"name\": \"f\", \"arguments\": \"{arguments}\"}}}}]}}]}}"
        )
    };
    let is_answered = |body: String| {
        let question = Question { api: TokensApi::Tokenize, body: body.into_bytes() };
        tokenizer.tokenize(&question).is_ok()
    };
    for escape in ["\\\\u001c", "\\u005cu001c", "\\u005cu001F"] {
        assert!(!is_answered(call(&format!("{{\\\"a\\\": \\\"{escape}\\\"}}"))), "{escape}");
    }
    for field in [
        "\"chat_template_kwargs\": {\"x\": \"\\u001d\"}",
        "\"tools\": [{\"function\": {\"name\": \"f\", \"parameters\": {\"\\u001E\": 1}}}]",
        "\"add_generation_prompt\": false, \"continue_final_message\": true, \"tools\": [{\"function\": {\"name\": \"\\u001f\"}}]",
    ] {
        assert!(!is_answered(format!("{{\"messages\": [{user}], {field}}}")), "{field}");
    }
    assert!(is_answered(call("{\\\"a\\\": \\\"b\\\"}")));
    assert!(is_answered(format!("{{\"messages\": [{user}]}}")));
}

#[test]
fn a_rendering_is_bounded_by_what_it_is_given() {
    let tokenizer = load(Family::ByteLevelBpe, CHATML);
    let message = |content: &str| json!({"role": "user", "content": content});
    let many = json!({"messages": vec![message(&"x".repeat(1_000)); 4_000]});
    assert_eq!(text(&tokenizer, &many), Err(Unsupported::TooLong));
    let few = json!({"messages": vec![message(&"x".repeat(100_000)); 40]});
    assert!(text(&tokenizer, &few).is_ok());

    let tokenizer = load(
        Family::ByteLevelBpe,
        "{% for i in range(99) %}{% for m in messages %}{{ m.content }}{% endfor %}{% endfor %}",
    );
    assert_eq!(text(&tokenizer, &few), Err(Unsupported::Template("failed")));
    assert!(text(&tokenizer, &json!({"messages": [message("x")]})).is_ok());
}

#[test]
fn templates_that_cannot_be_followed_leave_completions_alone() {
    let chat = ask(&json!({"messages": [{"role": "user", "content": "x"}]}));
    for (template, expected) in [
        ("{{ raise_exception('no') }}", Unsupported::Template("failed")),
        (
            "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
            Unsupported::Template("out of fuel"),
        ),
        ("{{ messages }}", Unsupported::Template("failed")),
        ("{{ messages[0].items }}", Unsupported::Template("failed")),
        ("{% if %}", Unsupported::Template("syntax")),
        ("{{ messages | no_such_filter }}", Unsupported::Template("unknown filter")),
        ("{{ strftime_now('%H:%M') }}", Unsupported::Template("failed")),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", Unsupported::Template("failed")),
    ] {
        let tokenizer = load(Family::ByteLevelBpe, template);
        assert_eq!(tokenizer.tokenize(&chat), Err(expected), "{template}");
        assert!(tokenizer.tokenize(&ask(&json!({"prompt": "x"}))).is_ok(), "{template}");
    }
    let bare = directory(Family::WordPiece, &[]);
    let tokenizer = LocalTokenizer::load(&bare.path().join("tokenizer.json")).expect("loaded");
    assert_eq!(tokenizer.tokenize(&chat), Err(Unsupported::NoTemplate));
    assert!(tokenizer.template_fault().is_some());
    assert!(tokenizer.tokenize(&ask(&json!({"prompt": "x"}))).is_ok());
}

#[test]
fn the_files_beside_the_tokenizer_say_which_template_and_which_special_tokens() {
    let config = json!({
        "chat_template": [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}],
        "added_tokens_decoder": {"9999": {"content": "<new>", "special": true, "normalized": false}},
        "eos_token": "<end>",
        "image_token": "<image>",
    });
    let named = directory(Family::ByteLevelBpe, &[("tokenizer_config.json", &config.to_string())]);
    let tokenizer = LocalTokenizer::load(named.path()).expect("loaded");
    let chat = json!({"messages": [{"role": "user", "content": "x"}]});
    let mut with_tools = chat.clone();
    with_tools["tools"] = json!([]);
    assert_eq!(text(&tokenizer, &chat).as_deref(), Ok("plain"));
    assert_eq!(text(&tokenizer, &with_tools).as_deref(), Ok("tools"));
    for added in ["<new>", "<end>", "<image>"] {
        assert_eq!(tokenizer.tokenize(&ask(&json!({"prompt": added}))).expect("tokenized").ids.len(), 2, "{added}");
    }

    let files = [
        ("tokenizer_config.json", config.to_string()),
        ("chat_template.jinja", "file".to_owned()),
        ("chat_template.json", json!({"chat_template": "processor"}).to_string()),
    ];
    let files = files.each_ref().map(|(name, content)| (*name, content.as_str()));
    let tokenizer = LocalTokenizer::load(directory(Family::ByteLevelBpe, &files).path()).expect("loaded");
    assert_eq!(text(&tokenizer, &chat).as_deref(), Ok("processor"));
    assert_eq!(text(&tokenizer, &with_tools).as_deref(), Ok("file"));
}

#[test]
fn a_class_that_builds_its_own_pre_tokenizer_is_named() {
    for (class, expected) in [("LlamaTokenizerFast", Some("LlamaTokenizerFast")), ("PreTrainedTokenizerFast", None)] {
        let config = json!({"tokenizer_class": class}).to_string();
        let model = directory(Family::ByteLevelBpe, &[("tokenizer_config.json", &config)]);
        assert_eq!(LocalTokenizer::load(model.path()).expect("loaded").unproved_class(), expected);
    }
}

#[test]
fn an_error_of_loading_names_the_file_and_what_was_expected() {
    let missing = LocalTokenizer::load(Path::new("/nonexistent/model")).expect_err("refused");
    assert!(missing.to_string().starts_with("/nonexistent/model is neither"), "{missing}");
    let empty = tempfile::tempdir().expect("a directory");
    let missing = LocalTokenizer::load(empty.path()).expect_err("refused");
    assert!(missing.to_string().ends_with("tokenizer.json cannot be read"), "{missing}");
    for (name, content, expected) in [
        ("tokenizer.json", "{}", "is not a tokenizer of the tokenizers library"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json is not a JSON object"),
        (
            "tokenizer_config.json",
            "{\"chat_template\": 1}",
            "chat_template is not text or a list of names and templates",
        ),
        ("tokenizer_config.json", "{\"bos_token\": 1}", "bos_token is not a token"),
        ("tokenizer_config.json", "{\"added_tokens_decoder\": {\"x\": {}}}", "is not an object of ids and tokens"),
        ("chat_template.json", "{}", "chat_template.json: chat_template is not text"),
    ] {
        let faulty = directory(Family::ByteLevelBpe, &[(name, content)]);
        let error = LocalTokenizer::load(faulty.path()).expect_err("refused").to_string();
        assert!(error.contains(expected), "{error}");
    }
}
