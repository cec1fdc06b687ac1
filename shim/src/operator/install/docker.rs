//! Docker's `daemon.json`: the runtime `bulkhead` is put into the text, and all else of it stays as it was written.

use serde_json::{Map, Value, json};

/// The file.
pub const FILE: &str = "/etc/docker/daemon.json";
const KEY: &str = "runtimes";
const NAME: &str = "bulkhead";

fn runtime() -> Value {
    json!({ "runtimeType": "io.containerd.bulkhead.v1" })
}

/// The file with the runtime; `None` if it has it already.
pub fn merge(before: &str) -> Result<Option<String>, String> {
    if before.trim().is_empty() {
        let all = json!({ KEY: { NAME: runtime() } });
        return Ok(Some(format!("{all:#}\n")));
    }
    let all: Map<String, Value> = serde_json::from_str(before).map_err(|e| e.to_string())?;
    let runtimes = match all.get(KEY) {
        None => None,
        Some(Value::Object(runtimes)) => Some(runtimes),
        Some(_) => return Err(format!("{KEY} is not an object")),
    };
    match runtimes.and_then(|runtimes| runtimes.get(NAME)) {
        Some(there) if *there == runtime() => return Ok(None),
        Some(_) => return Err(format!("{KEY}.{NAME} is there and is another runtime")),
        None => {}
    }
    let entry = format!("\"{NAME}\": {}", runtime());
    let (at, text, empty) = match runtimes {
        Some(runtimes) => (object_of(before, KEY), entry, runtimes.is_empty()),
        None => {
            let text = format!("\"{KEY}\": {{ {entry} }}");
            (before.find('{'), text, all.is_empty())
        }
    };
    let at = at.ok_or("its form is not understood")?.saturating_add(1);
    let (head, tail) = before.split_at(at);
    let indent = if runtimes.is_some() { 8 } else { 4 };
    let end = if empty { "\n" } else { "," };
    let after = format!("{head}\n{:indent$}{text}{end}{tail}", "");
    // The text was edited as text: what it means now must be what was wanted.
    let mut wanted = all.clone();
    if let Value::Object(runtimes) = wanted.entry(KEY).or_insert_with(|| json!({})) {
        runtimes.insert(NAME.into(), runtime());
    }
    match serde_json::from_str::<Map<String, Value>>(&after) {
        Ok(all) if all == wanted => Ok(Some(after)),
        _ => Err("its form is not understood".into()),
    }
}

/// Where the object that is the value of a key of the outermost object begins.
fn object_of(text: &str, key: &str) -> Option<usize> {
    let quoted = format!("\"{key}\"");
    let (mut depth, mut in_string, mut escaped, mut start) = (0_u32, false, false, 0);
    // Set while only blanks and a colon stand between the key and its value.
    let mut wanted = false;
    for (at, byte) in text.bytes().enumerate() {
        if in_string {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => {
                    in_string = false;
                    wanted = depth == 1 && text.get(start..=at) == Some(&quoted);
                }
                _ => {}
            }
            continue;
        }
        match byte {
            b'{' if wanted => return Some(at),
            b'{' | b'[' => depth = depth.saturating_add(1),
            b'}' | b']' => depth = depth.saturating_sub(1),
            b'"' => (in_string, start) = (true, at),
            _ => {}
        }
        wanted &= byte == b':' || byte.is_ascii_whitespace();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merged(before: &str) -> String {
        let after = merge(before).unwrap().unwrap();
        let value: Value = serde_json::from_str(&after).unwrap();
        assert_eq!(value["runtimes"]["bulkhead"], runtime(), "{after}");
        assert_eq!(merge(&after), Ok(None), "a second time changes nothing");
        after
    }

    #[test]
    fn what_is_there_stays_as_it_was_written() {
        let before = "{\n  \"dns\": [\"10.0.0.1\"],   \n  \"debug\": true\n}\n";
        let after = merged(before);
        assert_eq!(
            after,
            "{\n    \"runtimes\": { \"bulkhead\": {\"runtimeType\":\"io.containerd.bulkhead.v1\"} },\n  \
             \"dns\": [\"10.0.0.1\"],   \n  \"debug\": true\n}\n"
        );
        let runtimes = "{\"x\":\"runtimes\",\"y\":{\"runtimes\":{}},\"runtimes\" : {\"a\":{\"path\":\"/a\\\"\"}}}";
        let after = merged(runtimes);
        assert!(after.contains(r#""a":{"path":"/a\"""#), "{after}");
        for empty in [
            "",
            "{}",
            " { } ",
            "{\"runtimes\":{}}",
            "{\"runtimes\": { }, \"a\": 1}",
        ] {
            merged(empty);
        }
    }

    #[test]
    fn what_is_not_understood_is_left_alone() {
        for bad in [
            "[]",
            "{",
            "{\"runtimes\": 1}",
            "{\"runtimes\":{\"bulkhead\":{\"path\":\"/x\"}}}",
            // Written with escapes: the key is found by its meaning and not in the text.
            "{\"\\u0072untimes\": {\"a\": {}}}",
        ] {
            assert!(merge(bad).is_err(), "{bad}");
        }
    }
}
