"Texts, bytes and values that programs stumble over: what the hostile tests and `fuzz.py` feed to everything that reads."
from chroma_moe.tokenizer import HOSTILE, SPECIALS

TEXTS = {
    'empty': '', 'one space': ' ', 'white space of every kind': ' \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000',
    'NUL': '\x00', 'NULs inside': 'a\x00b\x00', 'control characters': ''.join(map(chr, range(32)))+'\x7f'+''.join(map(chr, range(128, 160))),
    'escape sequences of terminals': '\x1b[2J\x1b[31mred\x1b]0;title\x07\x1b[0m\x9b2J', 'backspaces': 'revenue\b\b\b\b\b\b\bprofit', 'bell': '\a'*500,
    'lone high surrogate': '\ud800', 'lone low surrogate': 'x\udfffy', 'surrogates the wrong way round': '\udc00\ud800', 'a pair in two halves': '\ud83d\ude00',
    'bytes that were no UTF-8': b'caf\xe9 \xff\xfe'.decode('utf-8', 'surrogateescape'),
    'from right to left': 'مرحبا שלום עולם', 'marks of direction': '\u202eabc\u202c \u2066x\u2069 \u200f\u200e \u061c', 'override never closed': '\u202e'*100,
    'zero width': '\u200b\u200c\u200d\u2060\ufeff', 'zero width inside words': 're\u200bve\u200dnue', 'soft hyphens': 're\u00adve\u00adnue',
    'variation selectors': 'a\ufe0f\ufe0e\U000e0100', 'tags': '\U000e0001\U000e0041\U000e007f', 'flood of marks': 'e'+'\u0301\u0300\u0327\u0338'*2000,
    'marks with nothing below': '\u0301\u0300\u0327', 'marks out of order': 'a\u0327\u0301 a\u0301\u0327',
    'mixed normal forms': 'é e\u0301 ﬁ fi Å Å Å ½ ² ™ ㎏',
    'hangul, whole and in parts': '한글 \u1112\u1161\u11ab\u1100\u1173\u11af', 'case that changes length': 'ß ẞ İ ı ŉ ǰ ΐ ﬀ Σ ς',
    'digits of the world': '٣٤٥ ३४५ ３４５ 𝟑𝟒𝟓 Ⅻ ⅔ ၃',
    'emoji': '👩\u200d👩\u200d👧\u200d👦👍🏽🏳️\u200d🌈🇩🇪1️⃣', 'a family too large': '👩\u200d'*3000, 'half a flag': '🇩', 'beyond the plane': '𐍈𠜎\U0010ffff',
    'no characters': '\ufffe\uffff\ufdd0\U0001ffff', 'private use': '\ue000\uf8ff\U000f0000', 'replacement': '\ufffd'*50,
    'byte order marks': '\ufeffa\ufeffb\ufffe',
    'carriage returns': 'one\rtwo\rthree\r', 'lines of every kind': 'a\nb\r\nc\rd\u2028e\u2029f\x85g', 'a thousand lines': '\n'*1000,
    'html': '<script>alert(1)</script><img src=x onerror=alert(2)>&lt;&amp;&#0;<!-- --> <![CDATA[x]]>', 'open tag': '<'*5000+'a', 'entities': '&lt;'*1000,
    'jinja': "{{ 7*7 }}{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}{# #}",
    'format': '{} {0} {x!r:>99999} %s %n %d %999999d ${x} `x`',
    'shell': '$(touch x); `touch x` && rm -rf x | cat > /dev/null \\', 'sql': "'; DROP TABLE texts; --", 'yaml': '!!python/object/apply:os.system ["true"]',
    'path': '../../../../etc/passwd', 'url': 'http://user:password@example.com/?q=%00#x', 'json': '{"text": "a", "text": [NaN]}',
    'quotes': '"\'\\"\'`´“”„«»'*50,
    'csv formula': '=cmd|\'/c calc\'!A1', 'special tokens': ' '.join(SPECIALS), 'special tokens joined': ''.join(SPECIALS)*50,
    'half a special token': '<mas k> <query< <pad',
    'special tokens of others': '[CLS] [SEP] [MASK] <s></s> <|endoftext|> <|im_start|> ▁ Ġ Ċ ##ing <0x0A>', 'special tokens in capitals': '<PAD><Mask><BOS>',
    'number of 5000 digits': '9'*5000, 'decimal of 5000 digits': '0.'+'3'*5000, 'grouped': ',000'*2000, 'signs': '-'*3000+'1', 'exponent': '1e'+'9'*400,
    'one letter': 'a', 'one letter, many times': 'a'*20_000, 'words': 'red wool sock '*2000, 'no space': 'xy'*10_000, 'spaces': ' '*20_000, 'tabs': '\t'*5000,
    'commas': ','*10_000, 'brackets': '('*5000+')'*5000, 'every script': ''.join(map(chr, range(0x100, 0x3000, 7))), 'underscores': '_'*9999,
    'a million': 'ab'*500_000,
} | {f'of the tokenizer {i}': t for i,t in enumerate(HOSTILE)}

SHORT = {k: t for k,t in TEXTS.items() if len(t)<=25_000}
WRITABLE = {k: t for k,t in SHORT.items() if t.isascii() or not any('\ud800'<=c<='\udfff' for c in t)}   # as UTF-8

VALUES = (None, True, False, 0, -1, 1, 3, 2**31, 2**63, 2**64, -2**63, 10**400, 1e308, -0.0, .5, float('nan'), float('inf'), -float('inf'), '', ' ', '0',
    '1e999', 'x'*70_000,
          '\ud800', '\x00', '../../../etc/passwd', '/etc/passwd', '.', '..', 'nul\n', '!!python/name:os.system', '{{7*7}}', '%s%n{0}', '<mask>', '٣', [],
          {}, [[]], [None],
          [1, 'a', None], {'': ''}, {'a': {'b': []}}, [0]*300, {'$tensor': 'x'}, {'$items': 3}, {'$tuple': None})

BYTES = (b'\x00', b'\xff', b'\xff\xfe', b'\xef\xbb\xbf', b'\xc0\x80', b'\xed\xa0\x80', b'\xf8\x88\x80\x80\x80', b'\r', b'\n', b'\n\n\n', b'"', b"'", b'\\',
    b'\\u0000', b'\\ud800',
         b'{', b'}', b'[', b']', b':', b',', b'-', b'&a ', b'*a ', b'!!python/object:os.system ', b'!!binary ', b'!!timestamp ', b'? ', b'| ', b'# ', b'%',
         b'NaN', b'Infinity', b'-1',
         b'1e999', b'9'*5000, b'0x', b'null', b'true', b'..', b'../', b'\x80\x02cos\nsystem\n(S"true"\ntR.', b'PK\x03\x04', b'\x93NUMPY\x01\x00',
         b'\x1f\x8b', b'\x28\xb5\x2f\xfd',
         b'PAR1', b'\x7fELF', (2**63).to_bytes(8, 'little'), b'\xff'*8, b'\x00'*64)
