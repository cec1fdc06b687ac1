//! The programs of cgroups. Most of it is `linux.resources.devices` as BPF (`BPF_PROG_TYPE_CGROUP_DEVICE`); at the end are those that tell
//! of sockets (`BPF_PROG_TYPE_CGROUP_SOCK`).
//!
//! The rules are first folded into a default and its exceptions, as cgroup v1 understood them; then each exception
//! becomes a few instructions. The program answers 1 to allow.

use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    os::fd::{AsRawFd, BorrowedFd},
};

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use crate::{
    error::{Error, Result},
    sys::bpf::BpfInsn,
};

// linux/bpf.h: access bits and device types in bpf_cgroup_dev_ctx.access_type (type low half, access high half).
const MKNOD: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;
const ALL: u32 = MKNOD | READ | WRITE;
const BLOCK: u32 = 1;
const CHAR: u32 = 2;

/// Devices a container can always use: its own nodes (see `devices`), pseudo terminals, and making nodes.
const ALWAYS: [(u32, Option<u32>, Option<u32>, u32); 10] = [
    (CHAR, None, None, MKNOD),
    (BLOCK, None, None, MKNOD),
    (CHAR, Some(1), Some(3), ALL),
    (CHAR, Some(1), Some(5), ALL),
    (CHAR, Some(1), Some(7), ALL),
    (CHAR, Some(1), Some(8), ALL),
    (CHAR, Some(1), Some(9), ALL),
    (CHAR, Some(5), Some(0), ALL),
    (CHAR, Some(5), Some(2), ALL),
    (CHAR, Some(136), None, ALL),
];

const DEFAULT_FIELD: &str = "default devices";

type Key = (u32, Option<u32>, Option<u32>);

/// A default and the exceptions from it.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Rules {
    allow: bool,
    exceptions: BTreeMap<Key, u32>,
}

impl Rules {
    /// Folds the spec's rules; a later rule wins over an earlier one.
    pub fn fold(rules: &[LinuxDeviceCgroup]) -> Result<Self> {
        let mut folded = Self::default();
        for (index, rule) in rules.iter().enumerate() {
            let field = format!("linux.resources.devices[{index}]");
            let access = access(&field, rule.access().as_deref())?;
            let number = |name: &str, value: Option<i64>| match value {
                None | Some(-1) => Ok(None),
                Some(value) => u32::try_from(value)
                    .map(Some)
                    .map_err(|_| Error::field(format!("{field}.{name}"), "is out of range")),
            };
            let major = number("major", rule.major())?;
            let minor = number("minor", rule.minor())?;
            let kind = match rule.typ().unwrap_or(LinuxDeviceType::A) {
                LinuxDeviceType::A => {
                    folded = Self {
                        allow: rule.allow(),
                        exceptions: BTreeMap::new(),
                    };
                    continue;
                }
                LinuxDeviceType::B => BLOCK,
                LinuxDeviceType::C | LinuxDeviceType::U => CHAR,
                LinuxDeviceType::P => {
                    return Err(Error::field(format!("{field}.type"), "is not a device"));
                }
            };
            folded.take(&field, (kind, major, minor), rule.allow(), access)?;
        }
        for (kind, major, minor, access) in ALWAYS {
            folded.take(DEFAULT_FIELD, (kind, major, minor), true, access)?;
        }
        Ok(folded)
    }

    fn take(&mut self, field: &str, key: Key, allow: bool, access: u32) -> Result<()> {
        if allow != self.allow {
            *self.exceptions.entry(key).or_default() |= access;
            return Ok(());
        }
        // The rule restores the default for these devices. An exception that covers more than the rule names cannot
        // be split; the default devices are allowed anyway where everything is.
        let partly = self.exceptions.iter().any(|(other, held)| {
            *other != key && held & access != 0 && overlap(*other, key) && !covers(key, *other)
        });
        if partly && field != DEFAULT_FIELD {
            return Err(Error::refused(format!(
                "{field}: taking one device out of the range of an earlier rule"
            )));
        }
        self.exceptions.retain(|other, held| {
            if covers(key, *other) {
                *held &= !access;
            }
            *held != 0
        });
        Ok(())
    }

    /// The program.
    pub fn program(&self) -> Vec<BpfInsn> {
        // r1 points to struct bpf_cgroup_dev_ctx { u32 access_type; u32 major; u32 minor; }.
        let mut program = vec![
            load(R2, 0),
            and(R2, 0xffff),
            load(R3, 0),
            shift_right(R3, 16),
            load(R4, 4),
            load(R5, 8),
        ];
        for ((kind, major, minor), access) in &self.exceptions {
            let mut block = vec![jump_unless_equal(R2, *kind)];
            if self.allow {
                // A denied access is any that has one of these bits.
                if *access != ALL {
                    block.extend([move_register(R1, R3), and(R1, *access), jump_if_zero(R1)]);
                }
            } else if *access != ALL {
                // An allowed access has none but these bits.
                block.extend([
                    move_register(R1, R3),
                    and(R1, !*access),
                    jump_unless_equal(R1, 0),
                ]);
            }
            if let Some(major) = major {
                block.push(jump_unless_equal(R4, *major));
            }
            if let Some(minor) = minor {
                block.push(jump_unless_equal(R5, *minor));
            }
            block.extend([set(R0, u32::from(!self.allow)), EXIT]);
            // Every jump of the block leads to its end.
            let length = block.len();
            for (position, instruction) in block.iter_mut().enumerate() {
                if instruction.off == TO_END {
                    let distance = length.saturating_sub(position).saturating_sub(1);
                    instruction.off = i16::try_from(distance).unwrap_or(i16::MAX);
                }
            }
            program.append(&mut block);
        }
        program.extend([set(R0, u32::from(self.allow)), EXIT]);
        program
    }
}

fn covers(outer: Key, inner: Key) -> bool {
    let part = |outer: Option<u32>, inner: Option<u32>| outer.is_none() || outer == inner;
    outer.0 == inner.0 && part(outer.1, inner.1) && part(outer.2, inner.2)
}

fn overlap(a: Key, b: Key) -> bool {
    let part = |a: Option<u32>, b: Option<u32>| a.is_none() || b.is_none() || a == b;
    a.0 == b.0 && part(a.1, b.1) && part(a.2, b.2)
}

fn access(field: &str, text: Option<&str>) -> Result<u32> {
    let Some(text) = text.filter(|text| !text.is_empty()) else {
        return Ok(ALL);
    };
    text.chars().try_fold(0, |bits, letter| {
        Ok(bits
            | match letter {
                'r' => READ,
                'w' => WRITE,
                'm' => MKNOD,
                _ => {
                    let reason = format!("\"{text}\" is not made of r, w, m");
                    return Err(Error::field(format!("{field}.access"), reason));
                }
            })
    })
}

const R0: u8 = 0;
const R1: u8 = 1;
const R2: u8 = 2;
const R3: u8 = 3;
const R4: u8 = 4;
const R5: u8 = 5;

/// Marks a jump whose distance is not known yet.
const TO_END: i16 = i16::MIN;

const EXIT: BpfInsn = instruction(0x95, 0, 0, 0);

const fn instruction(code: u8, regs: u8, off: i16, imm: u32) -> BpfInsn {
    BpfInsn {
        code,
        regs,
        off,
        imm: imm as i32,
    }
}

/// `to = *(u32 *)(r1 + offset)`
const fn load(to: u8, offset: i16) -> BpfInsn {
    instruction(0x61, to | (R1 << 4), offset, 0)
}

/// `to = from`, 32 bits.
const fn move_register(to: u8, from: u8) -> BpfInsn {
    instruction(0xbc, to | (from << 4), 0, 0)
}

/// `to = value`, 32 bits.
const fn set(to: u8, value: u32) -> BpfInsn {
    instruction(0xb4, to, 0, value)
}

/// `to &= mask`, 32 bits.
const fn and(to: u8, mask: u32) -> BpfInsn {
    instruction(0x54, to, 0, mask)
}

/// `to >>= bits`, 32 bits.
const fn shift_right(to: u8, bits: u32) -> BpfInsn {
    instruction(0x74, to, 0, bits)
}

/// 32-bit compare, so that a major above 2^31 is not sign-extended.
const fn jump_unless_equal(register: u8, value: u32) -> BpfInsn {
    instruction(0x56, register, TO_END, value)
}

const fn jump_if_zero(register: u8) -> BpfInsn {
    instruction(0x16, register, TO_END, 0)
}

/// `struct bpf_sock`: offsets of `protocol` and `state`.
const SOCK_PROTOCOL: i16 = 12;
const SOCK_STATE: i16 = 72;
/// `BPF_TCP_LISTEN`
const LISTEN: u32 = 10;

/// Program of the bind hooks: writes to the ring when a TCP socket was bound.
pub fn tell_bound(ring: BorrowedFd<'_>) -> Vec<BpfInsn> {
    tell(ring, SOCK_PROTOCOL, libc::IPPROTO_TCP as u32)
}

/// Program of the release hook: writes to the ring when a listening socket is closed.
pub fn tell_released(ring: BorrowedFd<'_>) -> Vec<BpfInsn> {
    tell(ring, SOCK_STATE, LISTEN)
}

/// Writes a word to the ring if a field of the socket has this value; lets the call pass in any case.
fn tell(ring: BorrowedFd<'_>, field: i16, value: u32) -> Vec<BpfInsn> {
    const R10: u8 = 10;
    const MAP: u8 = 1; // BPF_PSEUDO_MAP_FD
    const RINGBUF_OUTPUT: u32 = 130;
    let mut write = vec![
        instruction(0x7a, R10, -8, 0), // *(u64 *)(r10 - 8) = 0
        instruction(0x18, R1 | (MAP << 4), 0, ring.as_raw_fd() as u32), // r1 = the ring; two instructions
        instruction(0, 0, 0, 0),
        instruction(0xbf, R2 | (R10 << 4), 0, 0), // r2 = r10
        instruction(0x07, R2, 0, -8i32 as u32),   // r2 -= 8
        instruction(0xb7, R3, 0, 8),              // r3 = 8, the length
        instruction(0xb7, R4, 0, 0),              // r4 = 0, the flags
        instruction(0x85, 0, 0, RINGBUF_OUTPUT),
    ];
    let mut skip = jump_unless_equal(R2, value);
    skip.off = write.len() as i16;
    let mut program = vec![load(R2, field), skip];
    program.append(&mut write);
    program.extend([set(R0, 1), EXIT]);
    program
}

/// Program of the address hooks: an IPv4 address with one port gets another.
pub fn change_port(address: Ipv4Addr, from: u16, to: u16) -> Vec<BpfInsn> {
    // struct bpf_sock_addr: offsets of `user_ip4` and `user_port`, both in network byte order.
    const IP: i16 = 4;
    const PORT: i16 = 24;
    let port = |port: u16| u32::from(port.to_be());
    let mut program = vec![
        load(R2, IP),
        jump_unless_equal(R2, u32::from_ne_bytes(address.octets())),
        load(R2, PORT),
        jump_unless_equal(R2, port(from)),
        set(R2, port(to)),
        instruction(0x63, R1 | (R2 << 4), PORT, 0), // *(u32 *)(r1 + PORT) = r2
    ];
    let length = program.len();
    for (position, instruction) in program.iter_mut().enumerate() {
        if instruction.off == TO_END {
            instruction.off = (length - position - 1) as i16;
        }
    }
    program.extend([set(R0, 1), EXIT]);
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(json: &str) -> Rules {
        let rules: Vec<LinuxDeviceCgroup> = serde_json::from_str(json).unwrap();
        Rules::fold(&rules).unwrap()
    }

    /// Runs the program as the kernel would.
    fn run(program: &[BpfInsn], kind: u32, access: u32, major: u32, minor: u32) -> bool {
        let context = [kind | (access << 16), major, minor];
        let mut registers = [0u32; 6];
        let mut pc = 0;
        loop {
            let i = program[pc];
            let (to, from) = ((i.regs & 15) as usize, (i.regs >> 4) as usize);
            let imm = i.imm as u32;
            let jump = match i.code {
                0x61 => {
                    assert_eq!(from, 1, "loads go through r1");
                    registers[to] = context[i.off as usize / 4];
                    false
                }
                0xbc => {
                    registers[to] = registers[from];
                    false
                }
                0xb4 => {
                    registers[to] = imm;
                    false
                }
                0x54 => {
                    registers[to] &= imm;
                    false
                }
                0x74 => {
                    registers[to] >>= imm;
                    false
                }
                0x56 => registers[to] != imm,
                0x16 => registers[to] == imm,
                0x95 => return registers[0] == 1,
                code => panic!("instruction {code:#x}"),
            };
            pc += 1 + if jump { i.off as usize } else { 0 };
        }
    }

    #[test]
    fn without_rules_only_the_default_devices_work() {
        let p = rules("[]").program();
        assert!(run(&p, CHAR, READ | WRITE, 1, 3));
        assert!(run(&p, CHAR, READ | WRITE, 136, 7));
        assert!(run(&p, BLOCK, MKNOD, 8, 0));
        assert!(!run(&p, BLOCK, READ, 8, 0));
        assert!(!run(&p, CHAR, READ, 10, 229));
        assert!(!run(&p, CHAR, MKNOD | READ, 10, 229));
    }

    #[test]
    fn privileged_allows_everything() {
        let p =
            rules(r#"[{"allow":false,"access":"rwm"},{"allow":true,"access":"rwm"}]"#).program();
        assert!(run(&p, BLOCK, ALL, 8, 0));
        assert!(run(&p, CHAR, ALL, 250, 9));
    }

    #[test]
    fn an_allowed_device_has_only_its_access() {
        let p = rules(
            r#"[{"allow":false,"access":"rwm"},{"allow":true,"type":"b","major":8,"minor":1,"access":"r"}]"#,
        )
        .program();
        assert!(run(&p, BLOCK, READ, 8, 1));
        assert!(!run(&p, BLOCK, READ | WRITE, 8, 1));
        assert!(!run(&p, BLOCK, READ, 8, 2));
        assert!(!run(&p, CHAR, READ, 8, 1));
    }

    #[test]
    fn a_denied_device_in_an_open_list_loses_each_denied_access() {
        let p = rules(
            r#"[{"allow":true,"access":"rwm"},{"allow":false,"type":"b","major":8,"access":"w"}]"#,
        )
        .program();
        assert!(run(&p, BLOCK, READ, 8, 1));
        assert!(!run(&p, BLOCK, WRITE, 8, 1));
        assert!(!run(&p, BLOCK, READ | WRITE, 8, 1));
        assert!(run(&p, BLOCK, WRITE, 9, 1));
    }

    #[test]
    fn access_added_in_two_rules_works_together() {
        let p = rules(
            r#"[{"allow":true,"type":"c","major":10,"minor":200,"access":"r"},
            {"allow":true,"type":"c","major":10,"minor":200,"access":"w"}]"#,
        )
        .program();
        assert!(run(&p, CHAR, READ | WRITE, 10, 200));
    }

    #[test]
    fn a_later_denial_takes_an_earlier_permission_back() {
        let p = rules(
            r#"[{"allow":true,"type":"c","major":10,"minor":200,"access":"rw"},
            {"allow":false,"type":"c","major":10,"access":"w"}]"#,
        )
        .program();
        assert!(run(&p, CHAR, READ, 10, 200));
        assert!(!run(&p, CHAR, WRITE, 10, 200));
    }

    #[test]
    fn a_hole_in_an_allowed_range_is_refused() {
        let rules: Vec<LinuxDeviceCgroup> = serde_json::from_str(
            r#"[{"allow":true,"type":"c","major":10,"access":"rw"},
            {"allow":false,"type":"c","major":10,"minor":200,"access":"w"}]"#,
        )
        .unwrap();
        let error = Rules::fold(&rules).unwrap_err().text();
        assert!(error.contains("linux.resources.devices[1]"), "{error}");
    }

    #[test]
    fn unknown_access_letters_are_refused() {
        let rules: Vec<LinuxDeviceCgroup> =
            serde_json::from_str(r#"[{"allow":true,"type":"c","access":"rx"}]"#).unwrap();
        assert!(Rules::fold(&rules).unwrap_err().text().contains("access"));
    }
}
