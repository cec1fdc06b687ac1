//! Lists of CPUs and memory nodes in the kernel's form: `0-3,7`.

use std::collections::BTreeSet;

/// Largest number in a list (x86 kernels have at most 8192 CPUs).
const NUMBER_MAX: u32 = 8191;

/// The numbers of a list, in order; none if it is no list.
pub fn parse(list: &str) -> Option<Vec<u32>> {
    let mut numbers = BTreeSet::new();
    for range in list.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u32, u32) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        if first > last || last > NUMBER_MAX {
            return None;
        }
        numbers.extend(first..=last);
    }
    Some(numbers.into_iter().collect())
}

/// A list of numbers.
pub fn print(numbers: &[u32]) -> String {
    let numbers: Vec<String> = numbers.iter().map(ToString::to_string).collect();
    numbers.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_have_numbers_and_ranges() {
        assert_eq!(parse("0-2,7,1"), Some(vec![0, 1, 2, 7]));
        assert_eq!(parse("5"), Some(vec![5]));
        assert_eq!(print(&[0, 1, 7]), "0,1,7");
    }

    #[test]
    fn what_is_no_list_or_has_no_end_is_refused() {
        for list in [
            "",
            "a",
            "3-1",
            "0-4294967295",
            "-1",
            "1,,2",
            "0x1",
            "0-7:2/4",
        ] {
            assert_eq!(parse(list), None, "{list}");
        }
    }
}
