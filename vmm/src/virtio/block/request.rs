//! One request: header, data, status (virtio 1.3 section 5.2.6).

use std::io::{Read, Write};
use std::os::unix::fs::FileExt;

use super::{Disk, SECTOR, Slot};
use crate::limits;
use crate::virtio::chain::{Chain, ChainWriter};

const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;

const HEADER: usize = 16;
const ID_BYTES: usize = 20;
const STATUS_OK: u8 = 0;
const STATUS_IO_ERROR: u8 = 1;
const STATUS_UNSUPPORTED: u8 = 2;

/// Data passes through a buffer of this size.
const PIECE: usize = 64 << 10;

/// Does what a chain asks for; the answer is how many bytes of it were written. A chain without room for a status byte
/// gets none, and one with more room than the largest request has gets nothing else.
pub fn serve(chain: &Chain, slot: &Slot) -> u32 {
    let mut writer = chain.writer();
    let Some(room) = chain.writable_len().checked_sub(1) else {
        return 0;
    };
    if room > limits::BLOCK_REQUEST_BYTES {
        writer.skip(room);
        // Not from the first byte on, which is what the answer would tell.
        let _ = writer.write_all(&[STATUS_IO_ERROR]);
        return 0;
    }
    let status = match run(chain, slot, &mut writer, room) {
        Ok(()) => STATUS_OK,
        Err(status) => status,
    };
    // The status is the last byte, whatever was filled before it.
    let gap = writer.remaining().saturating_sub(1);
    if fill_zero(&mut writer, gap).is_err() || writer.write_all(&[status]).is_err() {
        return 0;
    }
    u32::try_from(chain.writable_len()).unwrap_or(u32::MAX)
}

fn run(chain: &Chain, slot: &Slot, writer: &mut ChainWriter, room: usize) -> Result<(), u8> {
    let mut reader = chain.reader();
    let mut header = [0; HEADER];
    reader.read_exact(&mut header).map_err(io_error)?;
    let (kind, sector) = parse(header);
    match kind {
        TYPE_IN => {
            let disk = slot.disk().ok_or(STATUS_IO_ERROR)?;
            let mut at = checked_range(&disk, sector, room)?;
            let mut piece = vec![0; room.min(PIECE)];
            while writer.remaining() > 1 {
                let len = piece.len().min(writer.remaining() - 1);
                let piece = piece.get_mut(..len).unwrap_or_default();
                disk.file.read_exact_at(piece, at).map_err(io_error)?;
                writer.write_all(piece).map_err(io_error)?;
                at = at.saturating_add(len as u64);
            }
            Ok(())
        }
        TYPE_OUT if slot.readonly => Err(STATUS_IO_ERROR),
        TYPE_OUT => {
            let disk = slot.disk().ok_or(STATUS_IO_ERROR)?;
            let len = reader.remaining();
            let mut at = checked_range(&disk, sector, len)?;
            let mut piece = vec![0; len.min(PIECE)];
            while reader.remaining() > 0 {
                let len = piece.len().min(reader.remaining());
                let piece = piece.get_mut(..len).unwrap_or_default();
                reader.read_exact(piece).map_err(io_error)?;
                disk.file.write_all_at(piece, at).map_err(io_error)?;
                at = at.saturating_add(len as u64);
            }
            Ok(())
        }
        TYPE_FLUSH => match slot.disk() {
            Some(disk) if !slot.readonly => disk.file.sync_data().map_err(io_error),
            _ => Ok(()),
        },
        TYPE_GET_ID => {
            let mut id = [0; ID_BYTES];
            for (to, from) in id.iter_mut().zip(slot.id().bytes()) {
                *to = from;
            }
            let id = id.get(..room.min(ID_BYTES)).unwrap_or_default();
            writer.write_all(id).map_err(io_error)
        }
        _ => Err(STATUS_UNSUPPORTED),
    }
}

/// Type and sector; four bytes between them are reserved.
fn parse(header: [u8; HEADER]) -> (u32, u64) {
    let [a, b, c, d, _, _, _, _, e, f, g, h, i, j, k, l] = header;
    (
        u32::from_le_bytes([a, b, c, d]),
        u64::from_le_bytes([e, f, g, h, i, j, k, l]),
    )
}

/// Byte offset of a request that lies whole within the disk.
fn checked_range(disk: &Disk, sector: u64, len: usize) -> Result<u64, u8> {
    if len > limits::BLOCK_REQUEST_BYTES || !(len as u64).is_multiple_of(SECTOR) {
        return Err(STATUS_IO_ERROR);
    }
    sector
        .checked_add(len as u64 / SECTOR)
        .filter(|end| *end <= disk.sectors)
        .and_then(|_| sector.checked_mul(SECTOR))
        .ok_or(STATUS_IO_ERROR)
}

fn fill_zero(writer: &mut ChainWriter, mut len: usize) -> std::io::Result<()> {
    let zeros = [0; 4096];
    while len > 0 {
        let piece = len.min(zeros.len());
        writer.write_all(zeros.get(..piece).unwrap_or_default())?;
        len -= piece;
    }
    Ok(())
}

fn io_error(error: std::io::Error) -> u8 {
    tracing::debug!(%error, "block request failed");
    STATUS_IO_ERROR
}
