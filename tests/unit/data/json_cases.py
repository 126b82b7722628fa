"""Values that are JSON, that are not, and that parsers disagree about, as bytes without line feed.

Each list goes through the grammar of RFC 8259: structure, arrays, objects, strings, numbers, words.
"""

VALID = [
    # objects and arrays
    b"{}", b"[]", b"[[]]", b'{"":0}', b'{"a":{"b":{"c":[]}}}', b"[null,true,false]", b"[[[[]]],{}]",
    b' \t{ "a" : [ 1 , 2 ] } \r', b"[[],[[]],{}]", b'[""," ","a"]', b'{"a":1,"A":1,"a ":1}',
    b"[" * 100 + b"]" * 100, b'{"a":' * 100 + b"0" + b"}" * 100,
    # strings
    rb'["\"\\\/\b\f\n\r\t"]', rb'["\u0041\u00e9\u4E2d"]', rb'["\ud83d\ude00\uD834\uDD1E"]',
    rb'["\\u0000 \\ud800 \\\\"]', '["\u2028\u2029\x7f\x85\u200b\ufeff\ufffe\uffff"]'.encode(),
    '["é中😀\U0010ffff"]'.encode(), rb'["\uFFFF\u2028\uD7FF\uE000"]', b'["/* no comment */ // #"]',
    rb'{"\u0061\"":"\u000a\u001f\u007f"}', b'["NaN","null","1e5","0x1","[","{"]',
    # numbers
    b"[0,-0,1,-1,10,-10]", b"[0.5,-0.5,10.25]", b"[1e5,1E5,1e+5,1e-5,0e0,-0e-0,1.5E+10]",
    b"[123456789012345678901234567890]", b"[1e-400,0e999]", b"[2.2250738585072011e-308]",
]  # fmt: skip

INVALID = [
    # structure: nothing, half of something, too much of it
    b"[", b"]", b"{", b"}", b"[]]", b"{}}", b"[}", b"{]", b"[[]", b'{"a"', b'{"a":', b'{"a":1',
    b'{"a":1,', b"[1", b"[1,", b"[,", b'["', b'["a', b'["a"', b'"', b"[] []", b"{} {}", b"[]x",
    b"x[]", b'{"a":1}#', b'{"a":1}//', b"/**/[]", b"[]/**/", b"[1]2", b"<null>", b"[<null>]",
    b"<html>", b"*", b"\x0c[]", b"[\x0c]", "\u00a0[]".encode(), "[\u2003]".encode(),
    "\u2060".encode(), b"[\x0b1]", "[]\ufeff".encode(), b"\\u005b]", b"[\\n]",
    b"[" * 101 + b"]" * 101, b"[" * 100_000, b'{"a":' * 100_000, b"[{" * 50_000, b"(1)", b"[1;2]",
    b"[a]", b"&", b";", b"{[]}", b"{{}}",
    # arrays
    b"[,1]", b"[1,]", b"[1,,2]", b"[1 2]", b"[[] []]", b'["a":1]', b"[1:2]", b"[,]", b'["",]',
    b"[ , ]",
    # objects
    b"{,}", b'{"a":1,}', b'{,"a":1}', b'{"a":1,,"b":2}', b'{"a" 1}', b'{"a":}', b"{:1}",
    b'{"a"::1}', b'{"a":1 "b":2}', b'{"a","b"}', b"{a:1}", b"{'a':1}", b"{1:1}", b"{null:1}",
    b"{[]:1}", b'{"a":1:2}', b'{"a":"b"]', b'{"a":1,"b"}', b'{"a"}', b'{"a":/**/1}',
    b'{"a":1,"a":1}', b'{"a":1,"a":2}', rb'{"a":1,"\u0061":2}', b'{"b":{"a":[],"a":[]}}',
    b'{"a":1;"b":2}', b'{"a"=1}',
    # strings
    b"['a']", b"[`a`]", '["a”]'.encode(), rb'["\x41"]', rb'["\a"]', rb'["\'"]', rb'["\0"]',
    rb'["\u"]', rb'["\u12"]', rb'["\u123g"]', rb'["\U00e9"]', rb'["\u 123"]', rb'["\u+123"]',
    b'["\\', b'["\\"', b'["a\tb"]', b'["\x1f"]', b'["\x00"]', b'["a\rb"]', rb'["\u0000"]',
    rb'[\u0022a"]', '["\\é"]'.encode(), '["\\😀"]'.encode(), rb'["\ud834\u"]', rb'["\ud834\u00"]',
    rb'["\u{41}"]',
    # numbers
    b"[01]", b"[-01]", b"[00]", b"[+1]", b"[++1]", b"[--1]", b"[-]", b"[+]", b"[.5]", b"[-.5]",
    b"[1.]", b"[1.e5]", b"[0.e1]", b"[1e]", b"[1e+]", b"[1E-]", b"[1.5e]", b"[1e5.5]", b"[1eE2]",
    b"[0x1F]", b"[0b1]", b"[0o7]", b"[1_000]", b"[1,000.]", b"[1 000]", b"[1.2.3]", b"[- 1]",
    b"[-a]", b"[1a]", b"[1L]", b"[1f]", b"[NaN]", b"[-NaN]", b"[nan]", b"[Infinity]",
    b"[-Infinity]", b"[inf]", b"[+Inf]", b"[1/2]", "[１]".encode(), "[٣]".encode(),
    "[1．5]".encode(), "[−1]".encode(), b"[$1]", b"[1%]", b"[0e]", b"[9.e+]",
    # words
    b"[nul]", b"[tru]", b"[fals]", b"[True]", b"[FALSE]", b"[None]", b"[NULL]", b"[undefined]",
    b"[nullx]", b"[true false]", b"[yes]", b"[truefalse]",
    # bytes that are not UTF-8, as they are or inside a string
    b"\xff", b'["\xff"]', b'["\xc0\xaf"]', b'["\xe0\x80\xaf"]', b'["\xed\xa0\x80"]',
    b'["\xed\xbf\xbf"]', b'["\xf4\x90\x80\x80"]', b'["\xe4\xb8"]', b'["\x80"]', b'["a\xc3"]',
    b'["\xfc\x80\x80\x80\x80\xaf"]', b"[\xe9]", b'{"\xb9":"0"}', b"\x00", b"[\x00]",
    b'[\x00"\x00a\x00"\x00]\x00',
]  # fmt: skip

# What RFC 8259 leaves open; this reader's answer: None takes it, else the kind of the refusal.
OPEN = {
    rb'["\ud800"]': "lone_surrogate",
    rb'["\udc00"]': "lone_surrogate",
    rb'["\ud800a"]': "lone_surrogate",
    rb'["\ud800\ud800\udc00"]': "lone_surrogate",
    rb'["\udc00\ud800"]': "lone_surrogate",
    rb'["\ud800\n"]': "lone_surrogate",
    rb'{"\udead":0}': "lone_surrogate",
    b"[1e999]": "malformed_json",
    b"[-1e999]": "malformed_json",
    b"[" + b"9" * 5000 + b"]": "malformed_json",
    b"[1e-999999]": None,
    b"[0.1000000000000000055511151231257827]": None,
    b"[" * 99 + b"{}" + b"]" * 99: None,
}
