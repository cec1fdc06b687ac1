//! Takes up what the machine was given after its start: CPUs are brought online, memory is added block by block.
//!
//! The kernel finds CPUs beyond those it started with in its tables, and leaves them off (`maxcpus=`). Memory that came
//! later it knows nothing of: an address written to `memory/probe` makes a block of it (CONFIG_ARCH_MEMORY_PROBE).

use std::{fs, io, path::Path};

use bulkhead_protocol::{
    agent::{GrowRequest, GrowResponse},
    limits::{GROWTH_MAX, VCPUS_MAX},
};

use crate::error::{Context, Error, Result};

const DEVICES: &str = "/sys/devices/system";

/// Brings online what the request names and is not; answers what is.
pub async fn grow(request: &GrowRequest) -> Result<GrowResponse> {
    grow_in(Path::new(DEVICES), request).await
}

async fn grow_in(devices: &Path, request: &GrowRequest) -> Result<GrowResponse> {
    if request.vcpus > VCPUS_MAX {
        return Err(Error::field("vcpus", format!("is more than {VCPUS_MAX}")));
    }
    let mut response = GrowResponse::new();
    // First, so that it does not wait for a CPU that does not come.
    if !request.memory.is_empty() {
        response.memory_bytes = memory(devices, request).await?;
    }
    // The first cannot be off.
    response.vcpus = 1;
    for cpu in 1..request.vcpus {
        online(&devices.join(format!("cpu/cpu{cpu}")))?;
        response.vcpus = response.vcpus.saturating_add(1);
        tokio::task::yield_now().await;
    }
    Ok(response)
}

/// Adds what is not there yet; how many bytes of what is asked for are there then.
async fn memory(devices: &Path, request: &GrowRequest) -> Result<u64> {
    let mut bytes = 0_u64;
    let memory = devices.join("memory");
    let size = block_size(&memory.join("block_size_bytes"))?;
    for (index, range) in request.memory.iter().enumerate() {
        let field = |what: &str| format!("memory[{index}].{what}");
        let end = range.address.checked_add(range.len);
        let end = end.filter(|_| range.len <= GROWTH_MAX);
        let end = end.ok_or_else(|| Error::field(field("len"), "is too large"))?;
        // Where blocks are larger than the host's steps, what does not fill one has to wait.
        let mut block = range.address.div_ceil(size);
        while let Some(next) = block.checked_add(1).filter(|next| {
            next.checked_mul(size)
                .is_some_and(|next_address| next_address <= end)
        }) {
            add(&memory, block, size)?;
            bytes = bytes.saturating_add(size);
            block = next;
            // A large growth takes a while, and everything else of the agent runs on this thread.
            tokio::task::yield_now().await;
        }
    }
    Ok(bytes)
}

/// Adds a block that is not there; the kernel brings it online by itself, unless somebody has told it otherwise.
fn add(memory: &Path, block: u64, size: u64) -> Result<()> {
    let device = memory.join(format!("memory{block}"));
    if !device.exists() {
        let address = block.saturating_mul(size);
        let probe = memory.join("probe");
        match fs::write(&probe, format!("{address:#x}")) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(Error::step(format!("add memory at {address:#x}"), error));
            }
            _ => {}
        }
    }
    online(&device)
}

fn online(device: &Path) -> Result<()> {
    let file = device.join("online");
    let state = fs::read_to_string(&file).step(|| format!("read {}", file.display()))?;
    if state.trim() == "1" {
        return Ok(());
    }
    fs::write(&file, "1").step(|| format!("bring {} online", device.display()))
}

/// A number in hexadecimal.
fn block_size(file: &Path) -> Result<u64> {
    let text = fs::read_to_string(file).step(|| format!("read {}", file.display()))?;
    let size = u64::from_str_radix(text.trim(), 16).ok();
    size.filter(|size| size.is_power_of_two())
        .ok_or_else(|| Error::State(format!("{} holds {:?}", file.display(), text.trim())))
}

#[cfg(test)]
mod tests {
    use bulkhead_protocol::agent::MemoryRange;

    use super::*;

    const BLOCK: u64 = 128 << 20;

    fn range(address: u64, len: u64) -> MemoryRange {
        MemoryRange {
            address,
            len,
            ..Default::default()
        }
    }

    fn request(vcpus: u32, memory: Vec<MemoryRange>) -> GrowRequest {
        GrowRequest {
            vcpus,
            memory,
            ..Default::default()
        }
    }

    /// `online` files of CPUs and blocks with their state, and the rest that the kernel has.
    fn system(states: &[(&str, &str)], block: u64) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (device, state) in states {
            fs::create_dir_all(dir.path().join(device)).unwrap();
            fs::write(dir.path().join(device).join("online"), state).unwrap();
        }
        let memory = dir.path().join("memory");
        fs::create_dir_all(&memory).unwrap();
        fs::write(memory.join("block_size_bytes"), format!("{block:x}\n")).unwrap();
        dir
    }

    #[tokio::test]
    async fn what_is_off_is_brought_online_and_what_is_online_stays() {
        let states = [
            ("cpu/cpu1", "1\n"),
            ("cpu/cpu2", "0\n"),
            ("memory/memory4", "1\n"),
            ("memory/memory5", "0\n"),
        ];
        let dir = system(&states, BLOCK);
        let wanted = request(3, vec![range(4 * BLOCK, 2 * BLOCK)]);
        for _ in 0..2 {
            let grown = grow_in(dir.path(), &wanted).await.unwrap();
            assert_eq!((grown.vcpus, grown.memory_bytes), (3, 2 * BLOCK));
            for (device, _) in states {
                let state = fs::read_to_string(dir.path().join(device).join("online"));
                assert_eq!(state.unwrap().trim(), "1", "{device}");
            }
        }
        // None of these was unknown.
        assert!(!dir.path().join("memory/probe").exists());
    }

    #[tokio::test]
    async fn a_block_that_the_kernel_does_not_know_is_told_by_its_address() {
        let dir = system(&[], BLOCK);
        let wanted = request(0, vec![range(32 * BLOCK, BLOCK)]);
        // No kernel makes the block here.
        grow_in(dir.path(), &wanted).await.unwrap_err();
        let told = fs::read_to_string(dir.path().join("memory/probe")).unwrap();
        assert_eq!(told, "0x100000000");
    }

    #[tokio::test]
    async fn larger_blocks_than_the_hosts_are_added_when_they_are_whole() {
        let dir = system(&[("memory/memory2", "1")], 2 * BLOCK);
        let wanted = request(0, vec![range(3 * BLOCK, 4 * BLOCK)]);
        let grown = grow_in(dir.path(), &wanted).await.unwrap();
        assert_eq!(grown.memory_bytes, 2 * BLOCK);
    }

    #[tokio::test]
    async fn nonsense_is_refused_by_its_field() {
        let dir = system(&[], BLOCK);
        let refused = async |request| grow_in(dir.path(), &request).await.unwrap_err().to_string();
        assert!(refused(request(33, vec![])).await.starts_with("vcpus"));
        let lengths = [(0, GROWTH_MAX + 1), (u64::MAX, 1)];
        for (address, len) in lengths {
            let text = refused(request(1, vec![range(address, len)])).await;
            assert!(text.starts_with("memory[0].len"), "{text}");
        }
        let missing = refused(request(2, vec![])).await;
        assert!(missing.contains("cpu1"), "{missing}");
    }
}
