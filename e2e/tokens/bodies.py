"""The bodies of the corpus: OpenAI requests as clients send them, written out for what is known to be difficult, drawn for the rest.

A body goes to `/v1/chat/completions` or `/v1/completions`; what an engine is asked for its tokens is made of it by `question`.
"""

import json
import random

import training_text

MODEL = "tiny"
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
N_DRAWN = 60

# What each family takes for special, so that users' text can hold it.
SPECIAL = {
    "tiny": ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|tool|>", "<unk>"],
    "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"],
    "qwen": ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<tool_call>", "</tool_call>", "<think>", "</think>"],
    "mistral": ["<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "<unk>", "<0x0A>", "▁"],
    "unigram": ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<pad>", "▁"],
    "wordpiece": ["[CLS]", "[SEP]", "[MASK]", "[UNK]", "<|im_start|>", "<|im_end|>", "WarmRoute", "warmroute"],
}

TEXTS = {
    "emoji": "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 🇩🇪🇯🇵 flags, 👍🏽 thumb, ❤️ and ❤, 🙂🙂🙂, 🫠",
    "rtl": "قال: \"hello\" ثم ذهب 123 ‏(שלום)‎ עולם \u202bmixed\u202c end",
    "combining": "e\u0301 é n\u0303 ñ a\u030a å Å \u212b ﬁ ﬀ ½ ① Ⅷ Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L̠ͨͧͩ͘G̴̻͈͍͔̹̑͗̎̅͛́Ǫ̵̹̻̝̳͂̌̌͘!",
    "hangul_jamo": "한국어 \u1112\u1161\u11ab\u1100\u116e\u11a8\u110b\u1165 가 \u1100\u1161",
    "cjk": "你好，世界！漢字カタカナひらがな　全角　スペース。ＡＢＣ１２３ ﾊﾝｶｸ 𠮷野家 㐂",
    "control": "a\u0000b\u0001c\u0007d\u001be\u007ff\u0085g\u200bh\ufeffi\u2028j\u2029k\u00adl\ufffdm\u00a0n",
    "newlines": "\n\na\n\n\nb\r\nc\rd\n \n\t\n  e  \n",
    "spaces": "  two   three    four\t\ttabs \u3000ideographic\u2003em ",
    "digits": "1 12 123 1234 12345 123456 1,234.50 -1e-9 0x1F ٠١٢٣ १२३ ²³ ½",
    "contractions": "I'm you're he'll I'D WE'VE don't 'tis o'clock rock'n'roll ’s ‘re it’s",
    "punctuation": "!!!??? ... --- ___ ~~~ `code` ```rust\nfn main() {}\n``` <a href=\"x\">&amp;</a> {{ jinja }} {% if %} {# no #}",
    "html": "<script>alert('x & y')</script> </s > <s > \\u003c \\n \\\\ / \"quoted\"",
    "mixed_scripts": "Größe размер サイズ 크기 μέγεθος حجم גודל आकार ขนาด İıŞş ß ẞ ΣΑΣ ς",
    "private": "\ue000\uf8ff \U000f0000 \U0010fffd \U0001f9ff \U00010348",
    "long_word": "pneumonoultramicroscopicsilicovolcanoconiosis" * 4,
    "repeated": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa " + "=" * 70 + " " * 40 + "x",
    "code": training_text.CODE[0] + training_text.CODE[1],
    "json": json.dumps({"a": [1, 2.5, None, True], "ключ": "значение", "nested": {"x": {}}}, ensure_ascii=False),
}

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]}},
            "required": ["city"],
        },
    },
}
TOOLS = {
    "weather": WEATHER,
    "no_parameters": {"type": "function", "function": {"name": "now", "description": "The time"}},
    "name_only": {"type": "function", "function": {"name": "ping"}},
    "null_parameters": {"type": "function", "function": {"name": "pong", "description": None, "parameters": None}},
    "strict": {"type": "function", "function": {"name": "exact", "description": "Exact", "strict": True, "parameters": {"type": "object"}}},
    "not_strict": {"type": "function", "function": {"strict": False, "name": "loose", "parameters": {"type": "object", "properties": {}}}},
    "key_order": {
        "function": {
            "parameters": {"required": ["z", "a"], "properties": {"z": {"type": "number"}, "a": {"type": "number"}}, "type": "object"},
            "description": "Keys in another order",
            "name": "reordered",
        },
        "type": "function",
    },
    "unicode": {
        "type": "function",
        "function": {
            "name": "übersetzen",
            "description": "Übersetzt «Text» – 翻訳する 🙂 <b>&amp;</b> 'single' \"double\" \\ / \t tab\nnew line \u2028 \u0001",
            "parameters": {"type": "object", "properties": {"текст": {"type": "string", "description": "文字列"}}, "required": ["текст"]},
        },
    },
    "numbers": {
        "type": "function",
        "function": {
            "name": "numbers",
            "parameters": {
                "type": "object",
                "properties": {
                    "x": {"type": "number", "minimum": 1.0, "maximum": 1e5, "multipleOf": 0.1, "default": -0.0},
                    "y": {"type": "number", "minimum": 1e-7, "maximum": 1e22, "default": 12345678901234567890, "exclusiveMinimum": 1.5e300},
                },
            },
        },
    },
    "nested": {
        "type": "function",
        "function": {
            "name": "nested",
            "description": "",
            "parameters": {
                "type": "object",
                "$defs": {"item": {"type": "object", "properties": {"id": {"type": "integer"}}, "additionalProperties": False}},
                "properties": {"items": {"type": "array", "items": {"$ref": "#/$defs/item"}, "minItems": 0}, "any": {"anyOf": [{}, True, None, []]}},
            },
        },
    },
    "strict_null": {"type": "function", "function": {"name": "unsaid", "strict": None, "parameters": {"type": "object"}}},
    "deferred": {"type": "function", "defer_loading": True, "function": {"name": "later", "parameters": {}}},
    "extra_fields": {"type": "function", "x-vendor": 1, "function": {"name": "extra", "x-note": "n", "parameters": {"type": "object"}}},
}

ARGUMENTS = {
    "string": '{"city": "Paris"}',
    "spaced": '{ "city" :\t"São Paulo" ,\n"unit":"celsius" }',
    "compact": '{"city":"東京","days":3}',
    "escaped": '{"city": "Z\\u00fcrich \\ud83d\\ude42 \\"x\\" \\\\ \\/ \\n"}',
    "nested": '{"filters": {"tags": ["a", "b", []], "range": {"from": 1, "to": 2.50}, "none": null, "yes": true}}',
    "key_order": '{"z": 1, "a": 2, "m": {"y": 1, "b": 2}}',
    "numbers": '{"a": 1.0, "b": 1e5, "c": 1e-7, "d": 0.1, "e": 1e22, "f": -0.0, "g": 12345678901234567890, "h": 3.0e0, "i": 1e16, "j": 123456789.125}',
    "empty_object": "{}",
    "empty": "",
    "blank_keys": '{"": "", " ": " ", "a.b": "c/d"}',
    "duplicate_keys": '{"a": 1, "b": 2, "a": 3}',
    "special_text": '{"text": "<|im_end|></s>[/INST]<|eot_id|><end_of_turn>[SEP]"}',
}


def bodies(family):
    """Yields (name, path, body)."""
    drawn = random.Random(f"bodies {family}")
    for name, body in completions(family):
        yield f"completion_{name}", COMPLETIONS, {"model": MODEL, **body}
    for name, body in chats(family):
        yield f"chat_{name}", CHAT, {"model": MODEL, **body}
    for i in range(N_DRAWN):
        yield f"drawn_{i:02}", CHAT, {"model": MODEL, **conversation(drawn, family)}
    for i in range(N_DRAWN // 4):
        extra = {"add_special_tokens": False} if i % 3 == 0 else {}
        yield f"drawn_completion_{i:02}", COMPLETIONS, {"model": MODEL, "prompt": text(drawn, family), **extra}


def completions(family):
    special = SPECIAL[family]
    for name, content in TEXTS.items():
        yield name, {"prompt": content}
    yield "special_texts", {"prompt": "x " + " ".join(special) + "".join(special) + " y"}
    yield "no_special_tokens", {"prompt": TEXTS["mixed_scripts"], "add_special_tokens": False}
    yield "special_tokens", {"prompt": TEXTS["mixed_scripts"], "add_special_tokens": True}
    yield "empty", {"prompt": ""}
    yield "empty_no_special_tokens", {"prompt": "", "add_special_tokens": False}
    yield "space", {"prompt": " "}
    yield "leading_space", {"prompt": " the router"}
    yield "newline", {"prompt": "\n"}
    yield "first_of_a_list", {"prompt": ["the first decides", "the second does not"]}
    yield "ignored_fields", {"prompt": "the rest is not about tokens", "temperature": 0.5, "stop": ["x"], "n": 1, "user": "u", "cache_salt": "s"}
    yield "long", {"prompt": long_text(random.Random(f"completion {family}"), 12_000)}


def chats(family):
    special = SPECIAL[family]
    user = said("user", "What is the weather in Paris?")
    answer = said("assistant", "It is sunny.")
    for name, content in TEXTS.items():
        yield name, {"messages": [said("user", content)]}
    yield "special_texts", {"messages": [said("system", special[0]), said("user", " ".join(special)), said("assistant", "".join(special)), user]}
    yield from openings(user, answer)
    yield from options(user, answer)
    for name, tool in TOOLS.items():
        yield f"tool_{name}", {"messages": [user], "tools": [tool]}
    yield "tools_all", {"messages": [said("system", "Use tools."), user, answer, said("user", "And in London?")], "tools": list(TOOLS.values())}
    yield "tools_empty", {"messages": [user], "tools": []}
    yield "tools_null", {"messages": [user], "tools": None}
    yield "tools_choice_none", {"messages": [user], "tools": [WEATHER], "tool_choice": "none"}
    for name, arguments in ARGUMENTS.items():
        messages = [user, calls([arguments]), result("sunny, 21°"), said("assistant", "Sunny.", reasoning_content="It said so."), said("user", "Thanks!")]
        yield f"arguments_{name}", {"messages": messages, "tools": [WEATHER]}
    yield "calls_two", {"messages": [user, calls(['{"city":"Paris"}', "{}"]), result("1", 0), result("2", 1)], "tools": [WEATHER]}
    yield "calls_with_text", {"messages": [user, calls(["{}"], content="Let me see."), result("")], "tools": [WEATHER]}
    yield "calls_empty_text", {"messages": [user, calls(["{}"], content=""), result("x")]}
    yield "calls_null", {"messages": [user, {**answer, "tool_calls": None}, said("user", "And?")]}
    yield "calls_object", {"messages": [user, calls([{"city": "Paris", "days": 2.0}]), result("x")], "tools": [WEATHER]}
    yield "calls_indexed", {"messages": [user, {**calls([]), "tool_calls": [{**call("abcdefg00", "{}"), "index": 0}]}, result("x")], "tools": [WEATHER]}
    untyped = {name: value for name, value in call("abcdefg00", "{}").items() if name != "type"}
    yield "calls_untyped", {"messages": [user, {**calls([]), "tool_calls": [untyped]}, result("x")], "tools": [WEATHER]}
    yield "tool_name", {"messages": [user, calls(["{}"]), {**result("x"), "name": "get_weather"}], "tools": [WEATHER]}
    yield "calls_none", {"messages": [user, {**answer, "tool_calls": []}, said("user", "And?")]}
    yield "call_id_short", {"messages": [user, {**calls(["{}"]), "tool_calls": [call("c", "{}")]}, said("tool", "x", tool_call_id="c")]}
    yield "arguments_not_json", {"messages": [user, calls(["{broken"]), result("x")]}
    yield "tool_result_json", {"messages": [user, calls(["{}"]), result(TEXTS["json"])], "tools": [WEATHER]}
    yield "tool_result_parts", {"messages": [user, calls(["{}"]), result([part("a"), part("b")])], "tools": [WEATHER]}
    yield "thoughts", {"messages": [user, said("assistant", "<think>\nhm\n</think>\n\nSunny."), user, said("assistant", "<think>\n</think>Rain.")]}
    yield "turns_20", {"messages": turns(20, family)}
    yield "turns_19_continued", {"messages": turns(19, family)[:-1], "continue_final_message": True, "add_generation_prompt": False}
    yield "long", {"messages": [said("system", "Summarize."), said("user", long_text(random.Random(f"chat {family}"), 9_000))]}


def openings(user, answer):
    """Who speaks first and last, and shapes of content."""
    yield "plain", {"messages": [user]}
    yield "system", {"messages": [said("system", "  Be brief.\n"), user]}
    yield "system_only", {"messages": [said("system", "Be brief.")]}
    yield "system_twice", {"messages": [said("system", "One."), said("system", "Two."), user]}
    yield "system_late", {"messages": [user, answer, said("system", "Be brief."), user]}
    yield "developer", {"messages": [said("developer", "Be brief."), user]}
    yield "developer_late", {"messages": [said("system", "One."), user, answer, said("developer", "Two."), user]}
    yield "assistant_first", {"messages": [answer, user]}
    yield "assistant_last", {"messages": [user, answer]}
    yield "user_twice", {"messages": [user, user]}
    yield "other_role", {"messages": [user, said("critic", "no"), user]}
    yield "no_messages", {"messages": []}
    yield "empty", {"messages": [said("user", "")]}
    yield "empty_system", {"messages": [said("system", ""), said("user", "")]}
    yield "blank", {"messages": [said("user", " \n\t "), said("assistant", "\n"), said("user", " ")]}
    yield "null_content", {"messages": [user, said("assistant", None), user]}
    yield "no_content", {"messages": [user, {"role": "assistant"}, user]}
    yield "name", {"messages": [said("user", "Hello", name="Ann"), said("assistant", "Hi Ann", name="bot"), said("user", "Bye", name="Zoë")]}
    yield "extra_fields", {"messages": [said("user", "Hello", foo=1, tool_call_id="x"), said("assistant", "x", refusal=None, audio=None), user]}
    yield "parts", {"messages": [said("user", [part("one"), part("two")])]}
    yield "parts_one", {"messages": [said("system", [part("Be brief.")]), said("user", [part(" one ")]), said("assistant", [part("x")]), user]}
    yield "parts_none", {"messages": [said("user", [])]}
    yield "parts_empty_text", {"messages": [said("user", [part(""), part(" a "), part("")])]}
    yield "parts_strings", {"messages": [said("user", ["one", part("two"), "three"])]}
    billing = "x-anthropic-billing-header: cch=12345;"
    yield "billing_header", {"messages": [said("system", billing + "\nBe brief."), user]}
    yield "billing_header_alone", {"messages": [said("system", billing), user]}
    yield "billing_header_part", {"messages": [said("system", [part(billing), part("Be brief.")]), user]}
    yield "billing_header_of_user", {"messages": [said("user", billing + "\nBe brief.")]}
    yield "parts_cache_control", {"messages": [said("user", [{**part("one"), "cache_control": {"type": "ephemeral"}}, {**part("two"), "x": 1}])]}
    yield "parts_refusal", {"messages": [user, said("assistant", [part("a"), {"type": "refusal", "refusal": "b"}]), user]}
    yield "parts_input_text", {"messages": [said("user", [part("c", "input_text")])]}
    yield "parts_output_text", {"messages": [user, said("assistant", [part("d", "output_text"), part("e")]), user]}
    yield "parts_thinking", {"messages": [user, said("assistant", [{"type": "thinking", "thinking": "hm"}, part("f")]), user]}
    yield "reasoning", {"messages": [user, said("assistant", "Sunny.", reasoning="It said so.")]}
    yield "reasoning_content", {"messages": [user, said("assistant", "Sunny.", reasoning_content="\nIt said so.\n")]}
    yield "reasoning_twice", {"messages": [user, said("assistant", "Sunny.", reasoning="New.", reasoning_content="Old.")]}
    yield "reasoning_null", {"messages": [user, said("assistant", "Sunny.", reasoning=None, reasoning_content="Old.")]}
    yield "reasoning_call", {"messages": [user, {**calls(["{}"]), "reasoning": "I ask."}, result("x")], "tools": [WEATHER]}
    yield "function_role", {"messages": [user, said("function", "x", name="get_weather"), user]}
    yield "function_call", {"messages": [user, said("assistant", None, function_call={"name": "now", "arguments": "{}"}), user]}
    yield "system_parts", {"messages": [said("system", [part(" One."), part("Two. ")]), user]}


def options(user, answer):
    """Fields beside the messages."""
    kwargs = lambda **kwargs: {"chat_template_kwargs": kwargs}
    documents = [{"title": "Wetter", "text": "Sonnig – 晴れ"}, {"text": "no title"}, {"title": "t"}]
    yield "no_generation_prompt", {"messages": [user], "add_generation_prompt": False}
    yield "generation_prompt", {"messages": [user], "add_generation_prompt": True}
    yield "continued", {"messages": [user, answer], "continue_final_message": True, "add_generation_prompt": False}
    yield "continued_space", {"messages": [user, said("assistant", " It is ")], "continue_final_message": True, "add_generation_prompt": False}
    yield "continued_repeated", {"messages": [said("user", "a"), said("assistant", "a")], "continue_final_message": True, "add_generation_prompt": False}
    yield "continued_user", {"messages": [user], "continue_final_message": True, "add_generation_prompt": False}
    yield "continued_parts", {"messages": [user, said("assistant", [part("It is")])], "continue_final_message": True, "add_generation_prompt": False}
    yield "continued_conflict", {"messages": [user, answer], "continue_final_message": True, "add_generation_prompt": True}
    yield "continued_default", {"messages": [user, answer], "continue_final_message": True}
    yield "continued_empty", {"messages": [user, said("assistant", "")], "continue_final_message": True, "add_generation_prompt": False}
    yield "special_tokens", {"messages": [user], "add_special_tokens": True}
    yield "special_tokens_continued", {
        "messages": [user, answer],
        "add_special_tokens": True,
        "continue_final_message": True,
        "add_generation_prompt": False,
    }
    yield "no_special_tokens", {"messages": [user], "add_special_tokens": False}
    yield "thinking", {"messages": [user], **kwargs(enable_thinking=True)}
    yield "no_thinking", {"messages": [user], **kwargs(enable_thinking=False)}
    yield "thinking_null", {"messages": [user], **kwargs(enable_thinking=None)}
    yield "kwargs_empty", {"messages": [user], "chat_template_kwargs": {}}
    yield "kwargs_unknown", {"messages": [user], **kwargs(no_such_thing={"a": [1]}, bos=1)}
    yield "kwargs_date", {"messages": [user], **kwargs(date_string="1 Jan 2025")}
    yield "kwargs_date_format", {"messages": [user], **kwargs(date_format="a day, 100 %%")}
    yield "kwargs_tools_in_system", {"messages": [said("system", "S"), user], "tools": [WEATHER, TOOLS["unicode"]], **kwargs(tools_in_user_message=False)}
    yield "kwargs_bos", {"messages": [user], **kwargs(bos_token="<<", eos_token=">>")}
    yield "kwargs_generation_prompt", {"messages": [user], **kwargs(add_generation_prompt=False)}
    yield "kwargs_continue", {"messages": [user, answer], **kwargs(continue_final_message=True)}
    yield "kwargs_tokenize", {"messages": [user], **kwargs(tokenize=True)}
    yield "kwargs_tools", {"messages": [user], **kwargs(tools=[WEATHER])}
    yield "kwargs_messages", {"messages": [user], **kwargs(messages=[answer])}
    yield "generation_prompt_text", {"messages": [user], "add_generation_prompt": "false"}
    yield "special_tokens_number", {"messages": [user], "add_special_tokens": 1}
    for effort in ("none", "low", "high"):
        yield f"effort_{effort}", {"messages": [user], "reasoning_effort": effort}
    yield "effort_and_kwargs", {"messages": [user], "reasoning_effort": "low", **kwargs(enable_thinking=False, reasoning_effort="high")}
    yield "documents", {"messages": [user], "documents": documents}
    yield "documents_kwargs", {"messages": [user], "documents": documents[:1], **kwargs(documents=documents[1:])}
    yield "documents_empty", {"messages": [user], "documents": []}
    yield "ignored_fields", {
        "messages": [user],
        "temperature": 0,
        "top_p": 1,
        "user": "u",
        "cache_salt": "s",
        "response_format": {"type": "text"},
        "logit_bias": {"5": 1},
        "metadata": {"messages": [], "tools": 1},
    }


def said(role, content, **fields):
    return {"role": role, "content": content, **fields}


def part(text, kind="text"):
    return {"type": kind, "text": text}


def call(id, arguments, name="get_weather"):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def calls(arguments, content=None):
    """A turn of the assistant that calls tools; their ids have nine characters, as Mistral's templates want."""
    return {"role": "assistant", "content": content, "tool_calls": [call(f"abcdefg{i:02}", text) for i, text in enumerate(arguments)]}


def result(content, i=0):
    return {"role": "tool", "tool_call_id": f"abcdefg{i:02}", "content": content}


def turns(n, family):
    drawn = random.Random(f"turns {family}")
    return [said(("user", "assistant")[i % 2], text(drawn, family)) for i in range(n)]


def conversation(drawn, family):
    """Messages in the order that most templates want, with tools and template arguments now and then."""
    messages = [said("system", text(drawn, family))] if drawn.random() < 0.5 else []
    body = {"messages": messages}
    if drawn.random() < 0.4:
        body["tools"] = drawn.sample(list(TOOLS.values()), drawn.randint(1, 4))
    for _ in range(drawn.choice([1, 1, 2, 3, 5, 9])):
        messages.append(said("user", text(drawn, family)))
        if "tools" in body and drawn.random() < 0.5:
            messages.append(calls([drawn.choice(list(ARGUMENTS.values()))], content=drawn.choice([None, "", text(drawn, family)])))
            messages.append(result(text(drawn, family)))
        messages.append(said("assistant", text(drawn, family)))
    ending = drawn.random()
    if ending < 0.7:
        messages.pop()
    elif ending < 0.85:
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    if drawn.random() < 0.2:
        body["chat_template_kwargs"] = {"enable_thinking": drawn.choice([True, False])}
    if drawn.random() < 0.1:
        body["reasoning_effort"] = drawn.choice(["none", "low", "medium", "high"])
    if drawn.random() < 0.1:
        body["add_special_tokens"] = True
    return body


def text(drawn, family):
    """A few pieces of prose, code, special texts and single characters."""
    pieces = []
    for _ in range(drawn.randint(1, 5)):
        kind = drawn.random()
        if kind < 0.5:
            words = drawn.choice(training_text.PROSE).split(" ")
            start = drawn.randrange(len(words))
            pieces.append(" ".join(words[start : start + drawn.randint(1, 15)]))
        elif kind < 0.65:
            content = drawn.choice(list(TEXTS.values()))
            start = drawn.randrange(len(content))
            pieces.append(content[start : start + drawn.randint(1, 40)])
        elif kind < 0.75:
            pieces.append(drawn.choice(SPECIAL[family]))
        elif kind < 0.85:
            pieces.append("".join(character(drawn) for _ in range(drawn.randint(1, 6))))
        else:
            pieces.append(str(drawn.randrange(10 ** drawn.randint(1, 9))))
    return drawn.choice(["", " ", " ", "\n", ", "]).join(pieces)


def character(drawn):
    """Any character that JSON can carry: from the first ones, those of the languages, or the whole range without surrogates."""
    return chr(drawn.choice([drawn.randrange(0x250), drawn.randrange(0x3000), drawn.randrange(0xE000, 0x10000), drawn.randrange(0x10000, 0x20000)]))


def long_text(drawn, n_characters):
    pieces = []
    while sum(map(len, pieces)) < n_characters:
        pieces.append(drawn.choice(training_text.PROSE[:12] + training_text.CODE))
    return "\n\n".join(pieces)


def question(path, body):
    """The body of `/tokenize` for a request: the fields that both have, and as template arguments those that it does not have. Fields of the
    request win over arguments of the same name."""
    if path == COMPLETIONS:
        first = body["prompt"][0] if isinstance(body["prompt"], list) else body["prompt"]
        asked = {**body, "prompt": first}
        return {name: asked[name] for name in ("model", "prompt", "add_special_tokens") if name in asked}
    kwargs = dict(body.get("chat_template_kwargs") or {})
    effort = body.get("reasoning_effort")
    if effort is not None:
        kwargs.setdefault("enable_thinking", effort != "none")
        kwargs["reasoning_effort"] = effort
    if body.get("documents") is not None:
        kwargs["documents"] = body["documents"]
    asked = {**body, "messages": [with_reasoning(message) for message in body["messages"]]}
    if kwargs or body.get("chat_template_kwargs") is not None:
        asked["chat_template_kwargs"] = kwargs
    names = ("model", "messages", "tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message", "add_special_tokens")
    return {name: asked[name] for name in names if asked.get(name) is not None}


def with_reasoning(message):
    """The message with the name that thoughts have by now, as a chat request is read and a question is not."""
    others = {name: value for name, value in message.items() if name != "reasoning_content"}
    if "reasoning_content" in message and others.get("reasoning") is None:
        others["reasoning"] = message["reasoning_content"]
    return others
