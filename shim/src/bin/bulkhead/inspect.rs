//! `bulkhead inspect`.

use std::process::ExitCode;

use bulkhead_shim::{config, operator::pods, sandbox::machine::is_shown};

use super::print;

#[derive(clap::Args)]
pub struct Args {
    /// `namespace/id`, an id, or a beginning of either that no other pod has
    #[arg(required = true, num_args = 1..=2, value_names = ["POD", "ID"])]
    pod: Vec<String>,
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    // Namespace and id may also be two arguments.
    let pod = pods::find(&config::state(), &args.pod.join("/"))?;
    let report = pod.inspect()?;
    print(&format!(
        "{}\n",
        escaped(&serde_json::to_string_pretty(&report)?)
    ))?;
    Ok(ExitCode::SUCCESS)
}

/// The same JSON without characters that a terminal would obey: the console in it is the guest's.
fn escaped(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    for c in json.chars() {
        if c == '\n' || is_shown(c) {
            text.push(c);
            continue;
        }
        for unit in c.encode_utf16(&mut [0; 2]) {
            text.push_str(&format!("\\u{unit:04x}"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_escaped_and_stays_the_same_json() {
        let value = serde_json::json!({ "console": "a\u{9b}2J\u{7f}\u{202e}\u{1b}[0m" });
        let text = escaped(&serde_json::to_string_pretty(&value).unwrap());
        assert!(text.chars().all(|c| c == '\n' || is_shown(c)), "{text}");
        let back: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(back, value);
    }
}
