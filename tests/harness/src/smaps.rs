//! What a process has mapped: `/proc/<pid>/smaps`, proc(5).

/// A mapping; those that touch and have one name and the same rights are one: the kernel splits a mapping where parts of it
/// have other attributes.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Map<'a> {
    /// The file, `[heap]` and the like, or nothing.
    pub name: &'a str,
    /// `rwxp`, with `-` for what is not allowed.
    pub rights: &'a str,
    /// KiB of addresses.
    pub kib: u64,
    /// KiB of memory in use.
    pub rss: u64,
    /// The same, of what several processes have mapped this one's part.
    pub pss: u64,
    /// KiB that no other process has mapped and this one has written.
    pub dirty: u64,
    end: u64,
}

/// The mappings that a text of smaps tells.
pub fn maps(smaps: &str) -> Vec<Map<'_>> {
    let mut maps: Vec<Map<'_>> = Vec::new();
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        let second = words.next().unwrap_or_default();
        if let Some((start, end)) = addresses(first) {
            let name = words.nth(3).unwrap_or_default();
            let kib = end.saturating_sub(start) >> 10;
            match maps.last_mut() {
                Some(last) if (last.end, last.name, last.rights) == (start, name, second) => {
                    (last.end, last.kib) = (end, last.kib + kib);
                }
                _ => maps.push(Map {
                    name,
                    rights: second,
                    kib,
                    end,
                    ..Map::default()
                }),
            }
        } else if let (Some(last), Ok(kib)) = (maps.last_mut(), second.parse::<u64>()) {
            match first {
                "Rss:" => last.rss += kib,
                "Pss:" => last.pss += kib,
                "Private_Dirty:" => last.dirty += kib,
                _ => {}
            }
        }
    }
    maps
}

/// Of a mapping's head line, `<start>-<end>` in hexadecimal.
fn addresses(word: &str) -> Option<(u64, u64)> {
    let (start, end) = word.split_once('-')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    Some((number(start)?, number(end)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_in_pieces_is_one() {
        let smaps = "10000000-18000000 rw-p 0 00:00 0\nSize: 131072 kB\nRss: 2050 kB\nPss: 2048 kB\n\
            18000000-20000000 rw-p 0 00:00 0\nPss: 1024 kB\nPrivate_Clean: 1 kB\nPrivate_Dirty: 2 kB\nVmFlags: rd wr\n\
            20000000-20001000 ---p 0 00:00 0\nPss: 0 kB\n\
            20001000-20002000 r-xp 0 fd:00 7 /bin/vmm\nPss: 4 kB\n";
        let maps = maps(smaps);
        let told = maps.iter().map(|m| (m.name, m.kib, m.rss, m.pss, m.dirty));
        let first = ("", 262_144, 2050, 3072, 2);
        assert_eq!(
            told.collect::<Vec<_>>(),
            [first, ("", 4, 0, 0, 0), ("/bin/vmm", 4, 0, 4, 0)]
        );
    }
}
