"""The text from which the tokenizers of the corpus are trained: several scripts, code, JSON and numbers, a few kilobytes."""

PROSE = [
    "The router reads every request, asks for its tokens, and sends it to the server that already holds the longest part of the prompt in its cache. "
    "When nothing is known it looks at the load instead, because waiting is worse than a cold start. It's simple, and that's why we've kept it: they'll "
    "see what I'd call a warm route, and you're welcome to measure it yourself. Don't trust the numbers that aren't printed beside their command.",
    "Once upon a time there was a small green fox who wanted to learn the history of music. She asked the teacher, the doctor and the old engineer of the "
    "town; each of them told her another story about drums, violins and the first electric piano. In the evening she wrote everything down, read it twice "
    "and understood that all three stories were the same story, told from different windows.",
    "Please answer the following question in one sentence. Think step by step, explain your reasoning, and then give the final answer. If you do not know "
    "the answer, say that you do not know. The user wants a short summary of the document, a list of cities, and a table with prices and dates.",
    "Weather report: in Paris it is sunny with 21 degrees, in London it is raining with 12 degrees, in Tokyo there will be snow at night. Wind from the "
    "north-west at 35 km/h; humidity 40 %, pressure 1013 hPa. Tomorrow will be warmer, with clouds in the morning and light rain after 18:30.",
    "Der schnelle braune Fuchs springt über den faulen Hund. Größere Straßen führen häufig über Brücken, und überall hört man Geschichten aus früheren "
    "Jahrhunderten. Könnten Sie mir bitte erklären, weshalb die Übertragung manchmal länger dauert? Natürlich, gerne: der Zwischenspeicher war leer.",
    "Le renard brun et rapide saute par-dessus le chien paresseux. L'été dernier, nous avons mangé des crêpes près de la forêt, où l'on entendait déjà "
    "les premières cloches. Pourquoi est-ce que la réponse n'est pas arrivée ? Parce que le serveur était occupé, c'est tout.",
    "El veloz zorro marrón salta sobre el perro perezoso. ¿Dónde está la estación más cercana? Mañana por la mañana iremos a la montaña con los niños; "
    "¡qué alegría! La canción que escuchamos anoche hablaba de un corazón pequeño y de un año difícil.",
    "A rápida raposa castanha salta sobre o cão preguiçoso. Não há pressa: amanhã também haverá pão, maçãs e uma canção na televisão.",
    "Szybki brązowy lis przeskakuje nad leniwym psem. Dziękuję bardzo, wszystko już działa; jutro spróbujemy jeszcze raz z większą liczbą żądań.",
    "Hızlı kahverengi tilki tembel köpeğin üzerinden atlar. İstanbul'da hava güneşli, Ankara'da yağmurlu; öğleden sonra görüşürüz.",
    "Con cáo nâu nhanh nhẹn nhảy qua con chó lười. Xin chào, hôm nay thời tiết ở Hà Nội rất đẹp, chúng tôi sẽ đi dạo và uống cà phê.",
    "Быстрая коричневая лиса прыгает через ленивую собаку. Пожалуйста, ответьте на следующий вопрос и объясните, почему сервер не успел. "
    "Ёлка стоит у окна, а за окном идёт снег; завтра будет теплее.",
    "Η γρήγορη καφέ αλεπού πηδάει πάνω από το τεμπέλικο σκυλί. Καλημέρα σας, τι ώρα φεύγει το τρένο για την Αθήνα;",
    "الثعلب البني السريع يقفز فوق الكلب الكسول. مرحبا بكم، كيف حالكم اليوم؟ الطقس جميل في القاهرة والمدينة هادئة.",
    "השועל החום המהיר קופץ מעל הכלב העצלן. שלום, מה שלומך היום? מזג האוויר בתל אביב נעים מאוד.",
    "तेज़ भूरी लोमड़ी आलसी कुत्ते के ऊपर कूदती है। नमस्ते, आज दिल्ली में मौसम बहुत अच्छा है। कृपया मेरे प्रश्न का उत्तर दीजिए।",
    "敏捷的棕色狐狸跳过了懒狗。你好，世界！请回答下面的问题，并说明理由。今天北京的天气很好，明天会下雨。我们把请求发送到缓存最多的服务器。",
    "素早い茶色の狐がのろまな犬を飛び越える。こんにちは、世界！次の質問に答えてください。今日の東京の天気は晴れです。テストとサーバーとキャッシュ。",
    "빠른 갈색 여우가 게으른 개를 뛰어넘는다. 안녕하세요, 오늘 서울의 날씨는 맑습니다. 다음 질문에 답해 주세요.",
    "สุนัขจิ้งจอกสีน้ำตาลกระโดดข้ามสุนัขขี้เกียจ สวัสดีครับ วันนี้อากาศดีมาก",
    "🙂 😀 🎉 👍 ❤️ 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 🇯🇵 — “quotes” ‘single’ «guillemets» … • → ≤ ≥ ≠ ± × ÷ € £ ¥ ½ ² ³ µ °",
]

CODE = [
    'def block_hashes(tokens, size=16):\n    """Yields one hash per full block."""\n    parent = None\n    for start in range(0, len(tokens) - size + 1, size):\n'
    "        parent = hash((parent, tuple(tokens[start:start + size])))\n        yield parent\n",
    'fn main() -> Result<(), Error> {\n    let listener = TcpListener::bind("127.0.0.1:8080")?;\n    for stream in listener.incoming() {\n'
    "        handle(stream?)?;\n    }\n    Ok(())\n}\n",
    "SELECT city, AVG(temperature) AS mean FROM weather WHERE day >= '2024-01-01' GROUP BY city ORDER BY mean DESC LIMIT 10;\n",
    "#!/bin/sh\nset -eu\nfor file in *.txt; do\n\techo \"$file\" | tr 'a-z' 'A-Z' >> out.log 2>&1 || exit 1\ndone\n",
    "# Title\n\n* one item\n* two items\n\n| name | value |\n|------|-------|\n| a    | 1     |\n\n```json\n{\"key\": [1, 2.5, true, null]}\n```\n",
    '{"type": "function", "function": {"name": "get_weather", "description": "Get the current weather in a city", "parameters": {"type": "object", '
    '"properties": {"city": {"type": "string", "description": "The name of the city"}, "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]}, '
    '"days": {"type": "integer", "minimum": 1}}, "required": ["city"]}}}\n',
    '{"name": "search_documents", "arguments": {"query": "history of music", "limit": 5, "filters": {"language": "en", "tags": ["a", "b"]}}}\n',
    "You are a helpful assistant. You may call one or more functions to assist with the user query. Cutting Knowledge Date: December 2023\nToday Date: "
    "26 Jul 2024\n\nsystem user assistant tool ipython developer function call response result answer\n",
    "https://example.com/path/to/page?query=value&lang=en#section user.name@example.org 192.168.0.1 2024-07-26T18:30:00Z 3.14159 1,000,000 0xdeadbeef\n",
]


def lines():
    """The text, line by line, as the trainers take it. What is technical counts more, as it does in what models are trained on."""
    for text in PROSE:
        yield from [text] * 2
    for text in CODE:
        yield from [text] * 3
