//! What an error says of a machine that failed: ten lines of 100 columns at most, for `kubectl describe`, `docker run` and `ctr`.
//! What the guest wrote is data: it is cut, and no control character of it passes.

use std::fmt;

use super::{
    machine::{End, is_shown},
    timeline::Stages,
};

/// Lines at most: an event of Kubernetes holds 1024 bytes.
pub const LINES: usize = 10;
/// Columns at most. What containerd and its clients put before the first line and after the last is theirs.
pub const COLUMNS: usize = 100;
/// Lines of a detail or an advice.
const TEXT_LINES: usize = 2;

const PANIC: &str = "Kernel panic - not syncing";

/// The parts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PostMortem {
    /// What happened, in one line.
    pub what: String,
    /// The reason in words.
    pub detail: String,
    /// What to do, if that is known.
    pub advice: String,
    /// How far the start came.
    pub stages: Stages,
    /// The end of the guest's console.
    pub console: String,
}

impl PostMortem {
    /// Of a machine that ended.
    pub fn of(end: &End) -> Self {
        // A guest that leaves before it runs has a reason, however orderly it goes.
        let as_wished = end.reason == "stopped" || end.is_orderly() && end.stages.are_done();
        let console = if as_wished { "" } else { &end.console };
        Self {
            what: format!(
                "the pod's machine ended while {}: {}",
                end.stages.doing(),
                end.reason
            ),
            detail: end.detail.clone(),
            advice: end.advice.clone(),
            stages: end.stages,
            console: console.to_owned(),
        }
    }
}

impl fmt::Display for PostMortem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut lines = wrap("", &self.what, 1);
        lines.extend(wrap("  ", &self.detail, TEXT_LINES));
        if !self.advice.is_empty() {
            lines.extend(wrap("  ", &format!("-> {}", self.advice), TEXT_LINES));
        }
        let took = wrap("  took: ", &self.stages.to_string(), TEXT_LINES);
        let room = LINES.saturating_sub(lines.len().saturating_add(took.len()).saturating_add(1));
        let said = last_lines(&self.console, room);
        if !said.is_empty() {
            lines.push("  the guest's last lines:".into());
            lines.extend(said);
        }
        lines.extend(took);
        write!(f, "{}", lines.join("\n"))
    }
}

/// The last lines of a console, each cut; of a panic those up to its line, as a trace of calls follows that tells less.
fn last_lines(console: &str, max: usize) -> Vec<String> {
    let panic = console.find(PANIC).map(|at| {
        let rest = console.get(at..).unwrap_or_default();
        at.saturating_add(rest.find('\n').unwrap_or(rest.len()))
    });
    let console = panic.and_then(|end| console.get(..end)).unwrap_or(console);
    let lines = console.lines().map(str::trim_end);
    let mut lines: Vec<String> = lines
        .rev()
        .filter(|line| !line.trim().is_empty())
        .take(max)
        .map(|line| cut(format!("  | {}", shown(line)), COLUMNS))
        .collect();
    lines.reverse();
    lines
}

/// Breaks `text` at words into `max` lines at most; those after the first are indented as far as `head` is long.
fn wrap(head: &str, text: &str, max: usize) -> Vec<String> {
    let text = shown(text);
    let mut lines: Vec<String> = Vec::new();
    let mut line = String::new();
    for word in text.split_whitespace() {
        let width = line.chars().count().saturating_add(word.chars().count());
        let room = COLUMNS.saturating_sub(head.len().saturating_add(1));
        if !line.is_empty() && width > room {
            lines.push(std::mem::take(&mut line));
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    if !line.is_empty() {
        lines.push(line);
    }
    if lines.len() > max {
        // What does not fit is cut off, visibly.
        let rest = lines.split_off(max.saturating_sub(1)).join(" ");
        lines.push(rest);
    }
    let indent = " ".repeat(head.len());
    let heads = std::iter::once(head).chain(std::iter::repeat(indent.as_str()));
    heads
        .zip(lines)
        .map(|(head, line)| cut(format!("{head}{line}"), COLUMNS))
        .collect()
}

fn shown(text: &str) -> String {
    text.chars()
        .map(|c| match c {
            '\n' | '\t' => ' ',
            c if is_shown(c) => c,
            _ => '?',
        })
        .collect()
}

fn cut(line: String, columns: usize) -> String {
    if line.chars().count() <= columns {
        return line;
    }
    let kept: String = line.chars().take(columns.saturating_sub(3)).collect();
    format!("{kept}...")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str) {
        assert!(text.lines().count() <= LINES, "{text}");
        assert!(text.len() < 1024 || !text.is_ascii(), "{text}");
        for line in text.lines() {
            assert!(line.chars().count() <= COLUMNS, "{line}");
            assert!(!line.chars().any(char::is_control), "{line:?}");
        }
    }

    #[test]
    fn the_worst_texts_fit_in_ten_lines_of_a_hundred_columns() {
        let long = PostMortem {
            what: "w".repeat(300),
            detail: "a detail\u{1b}[2J\r\n of many words ".repeat(100),
            advice: "do this and that ".repeat(50),
            stages: Stages::default(),
            console: format!("{}\n", "\u{7}line\tof the guest\u{202e} ".repeat(30)).repeat(200),
        };
        let text = long.to_string();
        check(&text);
        assert_eq!(text.lines().count(), LINES);
        assert!(
            text.contains("...") && text.contains("-> do this"),
            "{text}"
        );
        check(&PostMortem::default().to_string());
    }

    #[test]
    fn it_reads_from_what_happened_to_how_long_things_took() {
        let end = End {
            reason: "guest-panic".into(),
            detail: "Kernel panic - not syncing: No working init found.".into(),
            console: "[    0.1] one\n\n[    0.2] two\n".into(),
            ..End::default()
        };
        let text = PostMortem::of(&end).to_string();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines,
            [
                "the pod's machine ended while the shim waited for containerd: guest-panic",
                "  Kernel panic - not syncing: No working init found.",
                "  the guest's last lines:",
                "  | [    0.1] one",
                "  | [    0.2] two",
                "  took: shim not done after 0 us",
            ]
        );
    }

    #[test]
    fn of_a_panic_what_was_before_it_is_shown() {
        let end = End {
            console: "cause\nKernel panic - not syncing: x\nCall Trace:\n".into(),
            ..End::default()
        };
        let text = PostMortem::of(&end).to_string();
        assert!(text.contains("| cause\n  | Kernel panic"), "{text}");
        assert!(!text.contains("Call Trace"), "{text}");
    }

    #[test]
    fn an_end_that_was_asked_for_quotes_nothing_of_the_guest_and_one_before_it_ran_does() {
        let end = End {
            reason: "stopped".into(),
            console: "noise\n".into(),
            ..End::default()
        };
        assert!(!PostMortem::of(&end).to_string().contains("noise"));
        let left = End {
            reason: "guest-shutdown".into(),
            ..end
        };
        assert!(PostMortem::of(&left).to_string().contains("| noise"));
    }
}
