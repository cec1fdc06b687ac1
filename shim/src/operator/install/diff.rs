//! What an edit changes, as lines.

use std::fmt::Write;

/// Lines shown before and after a change.
const CONTEXT: usize = 2;

/// The lines that go (`-`) and come (`+`), with some around them; one place, from the first difference to the last.
pub fn diff(before: &str, after: &str) -> String {
    let (before, after): (Vec<&str>, Vec<&str>) =
        (before.lines().collect(), after.lines().collect());
    let same = |pair: &(&&str, &&str)| pair.0 == pair.1;
    let head = before.iter().zip(&after).take_while(same).count();
    let rest = before.len().min(after.len()).saturating_sub(head);
    let tail = before.iter().rev().zip(after.iter().rev());
    let tail = tail.take(rest).take_while(same).count();
    let mut text = String::new();
    let mut show = |mark: char, lines: &[&str]| {
        for line in lines {
            let _ = writeln!(text, "    {mark} {line}");
        }
    };
    let part = |lines: &'_ [&str], from: usize, to: usize| -> Vec<String> {
        let lines = lines.get(from..to).unwrap_or_default();
        lines.iter().map(|line| (*line).to_owned()).collect()
    };
    let ends = (
        before.len().saturating_sub(tail),
        after.len().saturating_sub(tail),
    );
    for (mark, lines) in [
        (' ', part(&before, head.saturating_sub(CONTEXT), head)),
        ('-', part(&before, head, ends.0)),
        ('+', part(&after, head, ends.1)),
        (
            ' ',
            part(
                &before,
                ends.0,
                ends.0.saturating_add(CONTEXT).min(before.len()),
            ),
        ),
    ] {
        let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
        show(mark, &lines);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_and_comes_is_shown_with_its_neighbours() {
        let text = diff("a\nb\nc\nd\ne\nf", "a\nb\nc\nX\nY\ne\nf");
        assert_eq!(
            text,
            "      b\n      c\n    - d\n    + X\n    + Y\n      e\n      f\n"
        );
        assert_eq!(diff("", "a"), "    + a\n");
        assert_eq!(diff("a\na", "a\na\na"), "      a\n      a\n    + a\n");
    }
}
