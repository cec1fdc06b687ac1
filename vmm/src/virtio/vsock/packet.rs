//! The header of a vsock packet (virtio 1.3 section 5.10.6), parsed here and nowhere else.

/// Bytes of a header on the wire.
pub const HEADER_LEN: usize = 44;
/// CID of the host (section 5.10.4).
pub const HOST_CID: u64 = 2;
/// VIRTIO_VSOCK_TYPE_STREAM, the only type of socket that we carry.
pub const TYPE_STREAM: u16 = 1;

/// VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE: the sender will receive no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// VIRTIO_VSOCK_SHUTDOWN_F_SEND: the sender will send no more.
pub const SHUTDOWN_SEND: u32 = 2;
/// Both directions.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// What a packet is about (section 5.10.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Operation {
    /// Asks for a connection.
    Request = 1,
    /// Accepts one.
    Response = 2,
    /// Refuses or ends one.
    Reset = 3,
    /// Half-closes one.
    Shutdown = 4,
    /// Carries bytes.
    Data = 5,
    /// Tells buffer space.
    CreditUpdate = 6,
    /// Asks for a [`Self::CreditUpdate`].
    CreditRequest = 7,
}

impl Operation {
    fn from_wire(value: u16) -> Option<Self> {
        Some(match value {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// The two ports that name a connection; the CIDs are always the guest's and the host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ports {
    /// The guest's end.
    pub guest: u32,
    /// The host's end.
    pub host: u32,
}

/// A packet's header, without the addresses that never vary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// The connection.
    pub ports: Ports,
    /// What it is about.
    pub operation: Operation,
    /// Bytes that follow the header.
    pub len: u32,
    /// SHUTDOWN_* of a [`Operation::Shutdown`].
    pub flags: u32,
    /// The sender's buffer space for this connection.
    pub buf_alloc: u32,
    /// Bytes that left that buffer so far, modulo 2^32.
    pub fwd_cnt: u32,
}

/// Why a packet of the guest is not carried.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PacketError {
    /// Source or destination is not what this guest may use. Dropped.
    #[error("packet from CID {src} to CID {dst}")]
    ForeignCid {
        /// Source CID.
        src: u64,
        /// Destination CID.
        dst: u64,
    },
    /// A type other than stream, or an unknown operation: answered by RST (section 5.10.6.1).
    #[error("packet of unknown type or operation")]
    Unsupported(Ports),
}

impl Packet {
    /// A packet without data.
    pub fn new(ports: Ports, operation: Operation) -> Self {
        Self {
            ports,
            operation,
            len: 0,
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }

    /// Parses a header that the guest with `guest_cid` sent.
    pub fn from_guest(header: &[u8; HEADER_LEN], guest_cid: u64) -> Result<Self, PacketError> {
        let (src, dst) = (u64_at(header, 0), u64_at(header, 8));
        if src != guest_cid || dst != HOST_CID {
            return Err(PacketError::ForeignCid { src, dst });
        }
        let ports = Ports {
            guest: u32_at(header, 16),
            host: u32_at(header, 20),
        };
        let operation = match Operation::from_wire(u16_at(header, 30)) {
            Some(operation) if u16_at(header, 28) == TYPE_STREAM => operation,
            _ => return Err(PacketError::Unsupported(ports)),
        };
        Ok(Self {
            ports,
            operation,
            len: u32_at(header, 24),
            flags: u32_at(header, 32),
            buf_alloc: u32_at(header, 36),
            fwd_cnt: u32_at(header, 40),
        })
    }

    /// The header of a packet for the guest with `guest_cid`.
    pub fn to_guest(self, guest_cid: u64) -> [u8; HEADER_LEN] {
        self.encode(HOST_CID, guest_cid, self.ports.host, self.ports.guest)
    }

    fn encode(self, src_cid: u64, dst_cid: u64, src_port: u32, dst_port: u32) -> [u8; HEADER_LEN] {
        let mut header = [0; HEADER_LEN];
        header[0..8].copy_from_slice(&src_cid.to_le_bytes());
        header[8..16].copy_from_slice(&dst_cid.to_le_bytes());
        header[16..20].copy_from_slice(&src_port.to_le_bytes());
        header[20..24].copy_from_slice(&dst_port.to_le_bytes());
        header[24..28].copy_from_slice(&self.len.to_le_bytes());
        header[28..30].copy_from_slice(&TYPE_STREAM.to_le_bytes());
        header[30..32].copy_from_slice(&(self.operation as u16).to_le_bytes());
        header[32..36].copy_from_slice(&self.flags.to_le_bytes());
        header[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        header[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        header
    }

    /// The header as a guest would send it.
    #[cfg(test)]
    pub fn as_sent_by_guest(self, guest_cid: u64) -> [u8; HEADER_LEN] {
        self.encode(guest_cid, HOST_CID, self.ports.guest, self.ports.host)
    }

    /// Reads a header that the device wrote.
    #[cfg(test)]
    pub fn seen_by_guest(header: &[u8; HEADER_LEN], guest_cid: u64) -> Self {
        let mut turned = *header;
        turned[0..8].copy_from_slice(&header[8..16]);
        turned[8..16].copy_from_slice(&header[0..8]);
        turned[16..20].copy_from_slice(&header[20..24]);
        turned[20..24].copy_from_slice(&header[16..20]);
        Self::from_guest(&turned, guest_cid).expect("device wrote a bad header")
    }
}

fn u16_at(bytes: &[u8; HEADER_LEN], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8; HEADER_LEN], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8; HEADER_LEN], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data_packet() -> Packet {
        Packet {
            ports: Ports {
                guest: 70_000,
                host: 1026,
            },
            operation: Operation::Data,
            len: 5,
            flags: 0,
            buf_alloc: 65536,
            fwd_cnt: 7,
        }
    }

    #[test]
    fn a_header_survives_encoding_and_parsing() {
        let header = data_packet().as_sent_by_guest(3);
        assert_eq!(Packet::from_guest(&header, 3), Ok(data_packet()));
        assert_eq!(
            Packet::seen_by_guest(&data_packet().to_guest(3), 3),
            data_packet()
        );
    }

    #[test]
    fn a_foreign_source_or_destination_is_refused() {
        let header = data_packet().as_sent_by_guest(4);
        assert_eq!(
            Packet::from_guest(&header, 3),
            Err(PacketError::ForeignCid {
                src: 4,
                dst: HOST_CID
            })
        );
        let mut header = data_packet().as_sent_by_guest(3);
        header[8] = 9;
        assert_eq!(
            Packet::from_guest(&header, 3),
            Err(PacketError::ForeignCid { src: 3, dst: 9 })
        );
    }

    #[test]
    fn seqpacket_and_unknown_operations_are_unsupported() {
        let mut header = data_packet().as_sent_by_guest(3);
        header[28] = 2;
        assert!(matches!(
            Packet::from_guest(&header, 3),
            Err(PacketError::Unsupported(_))
        ));
        let mut header = data_packet().as_sent_by_guest(3);
        header[30] = 8;
        assert!(matches!(
            Packet::from_guest(&header, 3),
            Err(PacketError::Unsupported(_))
        ));
    }
}
