//! A vhost-user device that is there and never answers the guest: it agrees to all and looks at no queue.
//! "Vhost-user Protocol" in QEMU's manual. So no moment of the host's comes into the guest's time.

use std::{
    io::{self, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
};

use bulkhead_harness::failure::{Context, Outcome};

const GET_FEATURES: u32 = 1;
const GET_VRING_BASE: u32 = 11;
const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_CONFIG: u32 = 24;

/// `VIRTIO_F_VERSION_1`, and that there are protocol features.
const FEATURES: u64 = 1 << 32 | 1 << 30;
/// The configuration space is the backend's.
const PROTOCOL_FEATURES: u64 = 1 << 9;
/// Protocol version 1, and that it is an answer.
const ANSWER: u32 = 0b101;
const HEADER: usize = 12;
const PAYLOAD_MAX: usize = 4096;
/// Offset, size and flags before the bytes of a configuration space.
const CONFIG_HEAD: usize = 12;

/// Listens for the emulator, whose device has this configuration space.
pub fn listen(socket: &Path, config: Vec<u8>) -> Outcome {
    let listener = UnixListener::bind(socket).context("a device's socket")?;
    std::thread::spawn(move || {
        if let Ok((stream, _)) = listener.accept() {
            // The end of the emulator.
            let _ = serve(stream, &config);
        }
    });
    Ok(())
}

fn serve(mut stream: UnixStream, config: &[u8]) -> io::Result<()> {
    loop {
        let mut header = [0; HEADER];
        stream.read_exact(&mut header)?;
        let word = |at: usize| {
            let bytes = header[at..at + 4].try_into();
            bytes.map_or(0, u32::from_le_bytes)
        };
        let (request, len) = (word(0), word(8) as usize);
        if len > PAYLOAD_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut payload = vec![0; len];
        stream.read_exact(&mut payload)?;
        let answer = match request {
            GET_FEATURES => FEATURES.to_le_bytes().to_vec(),
            GET_PROTOCOL_FEATURES => PROTOCOL_FEATURES.to_le_bytes().to_vec(),
            GET_VRING_BASE => payload,
            GET_CONFIG => {
                for (to, from) in payload.iter_mut().skip(CONFIG_HEAD).zip(config) {
                    *to = *from;
                }
                payload
            }
            _ => continue,
        };
        let len = (answer.len() as u32).to_le_bytes();
        let head = [request.to_le_bytes(), ANSWER.to_le_bytes(), len].concat();
        stream.write_all(&[head, answer].concat())?;
    }
}
