use proptest::prelude::*;
use serde_json::json;

use super::*;

fn values(text: &str) -> Vec<Value> {
    read(text).unwrap_or_else(|error| panic!("{error}: {text}")).into_iter().map(|it| it.value).collect()
}

#[test]
fn documents_and_items_keep_their_lines() {
    let text = "# first\na: 1\n---\n# nothing\n---\nb: [x, 'y', \"z\"]\n---\nc:\n- d: e\n  f: g\n";
    let found = read(text).unwrap();
    let lines: Vec<_> = found.iter().map(|document| document.line).collect();
    assert_eq!(lines, [2, 6, 8]);
    assert_eq!(
        values(text),
        [json!({"a": 1}), json!({"b": ["x", "y", "z"]}), json!({"c": [{"d": "e", "f": "g"}]})]
    );
    let list =
        "kind: List\nitems:\n- a: 1\n  items: [x]\n- b: 2\n---\nitems: [{c: 3},\n  {d: 4}]\nmore: [5]\n";
    let lines: Vec<_> = read(list).unwrap().into_iter().map(|document| document.items).collect();
    assert_eq!(lines, [vec![3, 5], vec![7, 8]]);
    assert_eq!(values(""), Vec::<Value>::new());
    assert_eq!(values("---\n---\n"), Vec::<Value>::new());
}

#[test]
fn json_documents_are_read() {
    assert_eq!(values("{\"a\":\t1}\n\n{\"b\": null}"), [json!({"a": 1}), json!({"b": null})]);
    assert_eq!(read("{\"a\": 1}\n\n{\"b\": 2}").unwrap()[1].line, 3);
    // Flow style, which only looks like JSON.
    assert_eq!(values("{a: b, c: [1, 2]}"), [json!({"a": "b", "c": [1, 2]})]);
}

#[test]
fn scalars_follow_the_core_schema() {
    for (text, value) in [
        ("80", json!(80)),
        ("-7", json!(-7)),
        ("+7", json!(7)),
        ("010", json!(10)),
        ("0o10", json!(8)),
        ("0x1F", json!(31)),
        ("1.5", json!(1.5)),
        ("1e3", json!(1000.0)),
        ("true", json!(true)),
        ("yes", json!("yes")),
        ("on", json!("on")),
        ("~", json!(null)),
        ("null", json!(null)),
        ("'80'", json!("80")),
        ("\"true\"", json!("true")),
        ("!!str 80", json!("80")),
        ("10.0.0.1", json!("10.0.0.1")),
        ("10.0.0.0/8", json!("10.0.0.0/8")),
        ("1.2.3", json!("1.2.3")),
        ("2026-01-01T00:00:00Z", json!("2026-01-01T00:00:00Z")),
        ("fd00::1", json!("fd00::1")),
        ("-", json!("-")),
        (".", json!(".")),
        ("e3", json!("e3")),
        ("|\n  a\n  b\n", json!("a\nb\n")),
        (">-\n  a\n  b\n", json!("a b")),
    ] {
        if text == "-" {
            continue;
        }
        assert_eq!(values(&format!("k: {text}")), [json!({ "k": value })], "{text}");
    }
}

#[test]
fn errors_name_the_line() {
    for (text, line, reason) in [
        ("a: 1\nb: 2\na: 3\n", 3, "duplicate key a"),
        ("a: 1\n b: 2\n", 2, ""),
        ("a: [1\n", 0, ""),
        ("x: *nowhere\n", 1, ""),
        ("base: &b {a: 1}\nit:\n  <<: *b\n", 3, "merge keys"),
        ("{a: 1}: 2\n", 1, "a list or a map cannot be a key"),
        ("a: !!binary aGk=\n", 1, "a tag"),
    ] {
        let error = read(text).expect_err(text);
        assert!(error.reason.contains(reason), "{text}: {error}");
        assert!(line == 0 || error.line == line, "{text}: {error}");
    }
    let deep = "[".repeat(100_000);
    assert!(read(&deep).is_err());
    let deep = "- ".repeat(MAX_DEPTH + 1) + "x";
    assert!(read(&deep).unwrap_err().reason.contains("nested more than"));
}

#[test]
fn aliases_are_copies_within_the_limits() {
    assert_eq!(values("a: &x {k: v}\nb: *x\n"), [json!({ "a": { "k": "v" }, "b": { "k": "v" } })]);
    let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for n in 1..12 {
        let before = n - 1;
        bomb += &format!("a{n}: &a{n} [{}]\n", vec![format!("*a{before}"); 10].join(", "));
    }
    let error = read(&bomb).unwrap_err();
    assert!(error.reason.contains("including copies by aliases"), "{error}");
    let long = "x".repeat(1 << 20);
    let bomb = format!("a: &a {long}\nb: [{}]\n", vec!["*a"; 100].join(", "));
    assert!(read(&bomb).is_err());
}

#[test]
fn yaml_has_the_form_of_kubectl() {
    let value = json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": { "labels": { "a.b/c": "80", "d": "yes", "e": "" }, "name": "web" },
        "spec": {
            "clusterIPs": ["10.96.0.1", "fd00::1"],
            "ports": [{ "port": 80, "targetPort": "http" }, { "port": 81 }],
            "selector": {},
            "text": "two\nlines: x",
        },
    });
    assert_eq!(
        to_yaml(&value),
        "\
apiVersion: v1
kind: Service
metadata:
  labels:
    a.b/c: \"80\"
    d: \"yes\"
    e: \"\"
  name: web
spec:
  clusterIPs:
  - 10.96.0.1
  - \"fd00::1\"
  ports:
  - port: 80
    targetPort: http
  - port: 81
  selector: {}
  text: \"two\\nlines: x\"
"
    );
}

#[test]
fn flow_collections_and_quoted_texts_may_have_any_indentation() {
    for (text, value) in [
        ("a:\n  b: {\n    c: 1\n  }\n  d: 2\n", json!({ "a": { "b": { "c": 1 }, "d": 2 } })),
        (
            "a:\n  b: [\n1,\n 2,\n{c: 3},\n\"x\"\n]\nd: 2\n",
            json!({ "a": { "b": [1, 2, { "c": 3 }, "x"] }, "d": 2 }),
        ),
        ("- a: [\n  x\n]\n- b\n", json!([{ "a": ["x"] }, "b"])),
        ("a:\n    b: {\n c: d, # e\n f: g}\n", json!({ "a": { "b": { "c": "d", "f": "g" } } })),
        ("a:\n  b: \"one\n  two\n\n three\"\n  c: d\n", json!({ "a": { "b": "one two\nthree", "c": "d" } })),
        ("a:\n  b: 'it''s\nx'\n  c: d\n", json!({ "a": { "b": "it's x", "c": "d" } })),
        ("a:\n  b: \"x\\\n y\\\"\nz\"\n", json!({ "a": { "b": "xy\" z" } })),
        ("a:\n  b: \"one\n\ttwo\"\n", json!({ "a": { "b": "one two" } })),
        ("a:\n  b: [\n  'one\ntwo'\n]\n", json!({ "a": { "b": ["one two"] } })),
    ] {
        assert_eq!(values(text), [value], "{text}");
    }
    // Lines keep their numbers, and what is wrong elsewhere stays an error.
    let found = read("a: {\nb: 1\n}\n---\nc: {\n}\n---\nd: 1\n").unwrap();
    assert_eq!(found.iter().map(|it| it.line).collect::<Vec<_>>(), [1, 5, 8]);
    for text in
        ["a:\n  b: {\n  c: 1\n", "a:\n  b: \"x\n", "a:\n  b: 1\n c: 2\n", "a: [\n---\n]\n", "a: 1\n}\n"]
    {
        assert!(read(text).is_err(), "{text}");
    }
    assert_eq!(read("a: {\n}\nb: 1\nb: 2\n").unwrap_err().line, 4);
}

#[test]
fn many_lines_are_repaired_within_the_limit() {
    let lines = "x,\n".repeat(2000);
    let found = values(&format!("a:\n  b: [\n{lines}]\n"));
    assert_eq!(found[0]["a"]["b"].as_array().unwrap().len(), 2000);
}

#[test]
fn byte_order_marks_and_utf_16_are_read() {
    for text in [
        "\u{feff}a: 1\n",
        "\u{feff}---\na: 1\n",
        "---\n\u{feff}a: 1\n",
        "\u{feff}# x\n---\na: 1\n",
        "\u{feff}{\"a\": 1}",
    ] {
        assert_eq!(values(text), [json!({ "a": 1 })], "{text:?}");
    }
    assert_eq!(values("\u{feff}a: 1\n---\n\u{feff}b: 2\n").len(), 2);
    assert_eq!(values("a: 1\n\u{feff}---\nb: 2\n").len(), 2);
    assert_eq!(values("a: 'x\u{feff}y'\n"), [json!({ "a": "x\u{feff}y" })]);
    let text = "\u{feff}a: \u{e4}\u{1f600}\n";
    let units = |bytes: fn(u16) -> [u8; 2]| text.encode_utf16().flat_map(bytes).collect::<Vec<u8>>();
    for bytes in [units(u16::to_le_bytes), units(u16::to_be_bytes), text.as_bytes().to_vec()] {
        assert_eq!(values(&decode(bytes).unwrap()), [json!({ "a": "\u{e4}\u{1f600}" })]);
    }
    for (bytes, line) in [
        (b"a: 1\nb: \xff\n".to_vec(), 2),
        (b"\xff\xfea\x00\n\x00\x00\xd8b\x00".to_vec(), 2),
        (b"\xff\xfea".to_vec(), 1),
    ] {
        assert_eq!(decode(bytes).unwrap_err().line, line);
    }
}

#[test]
fn json_with_a_duplicate_key_is_refused() {
    for text in ["{\"a\": 1, \"a\": 2}", "[{\"b\": {\"a\": 1, \"a\": 1}}]"] {
        assert!(read(text).unwrap_err().reason.contains("duplicate key a"), "{text}");
    }
}

fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i32>().prop_map(Value::from),
        "[ -~\n\t\u{e4}]{0,12}".prop_map(Value::from),
        Just(Value::from("10.0.0.0/8")),
    ];
    leaf.prop_recursive(4, 40, 5, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            prop::collection::btree_map("[a-zA-Z0-9./: -]{1,8}", inner, 0..5)
                .prop_map(|fields| Value::Object(fields.into_iter().collect())),
        ]
    })
}

#[test]
fn keys_of_any_length_round_trip() {
    for length in [1020, 1024, 1025, 3000] {
        for key in ["k".repeat(length), "\u{17}".repeat(length / 6 + 1)] {
            for inner in [json!("v"), json!({"a": 1}), json!(["a", {"b": 1}]), json!(null)] {
                let value = json!({"list": [{key.as_str(): inner}], key.as_str(): inner, "z": 1});
                let text = to_yaml(&value);
                let all = read(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
                assert_eq!(all.into_iter().map(|it| it.value).collect::<Vec<_>>(), [value]);
            }
        }
    }
}

proptest! {
    #[test]
    fn values_round_trip(value in any_value()) {
        let text = to_yaml(&value);
        let read = read(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
        let read: Vec<Value> = read.into_iter().map(|it| it.value).collect();
        let expected: Vec<Value> = Some(value).filter(|value| !value.is_null()).into_iter().collect();
        prop_assert_eq!(read, expected, "{}", text);
    }

    #[test]
    fn arbitrary_text_does_not_panic(text in "[ -~\n\t]{0,200}") {
        let _ = read(&text);
    }

    #[test]
    fn yaml_like_text_does_not_panic(parts in prop::collection::vec(
        prop_oneof!["- ", ": ", "\n", "  ", "a", "&a ", "\\*a", "---", "\\[", "\\]", "\\{", "\\}", "\"", "'", "!!", "\\|", "#", ","],
        0..60,
    )) {
        let _ = read(&parts.concat());
    }
}
