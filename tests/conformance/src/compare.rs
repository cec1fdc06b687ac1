//! What two sides saw, compared value by value.

use serde_json::Value;

/// A place where the two differ.
#[derive(Clone, Debug, PartialEq)]
pub struct Difference {
    /// Keys from the outside in.
    pub at: Vec<String>,
    /// What Bulkhead's container saw; null if it saw nothing there.
    pub ours: Value,
    /// What runc's saw.
    pub runc: Value,
}

impl Difference {
    /// The place as one text; keys that hold slashes or dots stand in brackets.
    pub fn place(&self) -> String {
        let mut text = String::new();
        for key in &self.at {
            if key.contains(['/', '.', ' ']) {
                text.push_str(&format!("[{key}]"));
            } else {
                if !text.is_empty() {
                    text.push('.');
                }
                text.push_str(key);
            }
        }
        text
    }
}

/// Every difference, deepest place first found.
pub fn differences(ours: &Value, runc: &Value) -> Vec<Difference> {
    let mut found = Vec::new();
    walk(&mut Vec::new(), ours, runc, &mut found);
    found
}

fn walk(at: &mut Vec<String>, ours: &Value, runc: &Value, found: &mut Vec<Difference>) {
    if let (Value::Object(a), Value::Object(b)) = (ours, runc) {
        let mut keys: Vec<&String> = a
            .keys()
            .chain(b.keys().filter(|k| !a.contains_key(*k)))
            .collect();
        keys.sort();
        for key in keys {
            at.push(key.clone());
            let value =
                |map: &serde_json::Map<String, Value>| map.get(key).cloned().unwrap_or(Value::Null);
            walk(at, &value(a), &value(b), found);
            at.pop();
        }
    } else if ours != runc {
        found.push(Difference {
            at: at.clone(),
            ours: ours.clone(),
            runc: runc.clone(),
        });
    }
}

/// What of `wanted` does not hold in `seen`, one line a place. Objects are looked at key by key, the rest must be equal.
pub fn missing(wanted: &Value, seen: &Value) -> Vec<String> {
    let mut lines = Vec::new();
    look(&mut Vec::new(), wanted, seen, &mut lines);
    lines
}

fn look(at: &mut Vec<String>, wanted: &Value, seen: &Value, lines: &mut Vec<String>) {
    match wanted {
        Value::Object(map) => {
            for (key, value) in map {
                at.push(key.clone());
                look(at, value, seen.get(key).unwrap_or(&Value::Null), lines);
                at.pop();
            }
        }
        Value::Null if at.is_empty() => {}
        _ if wanted != seen => {
            lines.push(format!("{}: {seen}, expected {wanted}", at.join(".")));
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_key_on_one_side_is_a_difference() {
        let found = differences(
            &json!({ "a": 1, "b": { "c": 2 } }),
            &json!({ "a": 1, "b": {} }),
        );
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].place(), "b.c");
        assert_eq!((&found[0].ours, &found[0].runc), (&json!(2), &Value::Null));
    }

    #[test]
    fn lists_are_compared_whole() {
        assert_eq!(differences(&json!([1, 2]), &json!([2, 1])).len(), 1);
    }

    #[test]
    fn what_is_wanted_must_be_there() {
        let seen = json!({ "a": { "b": 1, "c": 2 } });
        assert!(missing(&json!({ "a": { "b": 1 } }), &seen).is_empty());
        assert_eq!(
            missing(&json!({ "a": { "b": 3 } }), &seen),
            ["a.b: 1, expected 3"]
        );
        assert_eq!(missing(&json!({ "x": 1 }), &seen).len(), 1);
    }
}
