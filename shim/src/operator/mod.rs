//! What the operator's command does, apart from its command line: pods by their state folders, their logs, a debugging shell in
//! the guest, and the installation.

pub mod install;
pub mod logs;
pub mod pods;
pub mod shell;
pub mod table;

/// What a guest or another process wrote, made fit for a terminal: no control character but tab and line feed passes.
pub fn shown(text: &str) -> String {
    let text = text.replace("\r\n", "\n");
    text.chars()
        .map(|c| match c {
            '\n' | '\t' => c,
            c if crate::sandbox::machine::is_shown(c) => c,
            _ => '?',
        })
        .collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn lines_stay_and_escapes_go() {
        assert_eq!(super::shown("a\r\nb\tc\u{1b}[2J\n"), "a\nb\tc?[2J\n");
    }
}
