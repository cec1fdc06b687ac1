//! The header before a frame of the guest (virtio 1.3 section 5.1.6.2), checked before the kernel's tap sees it.

use super::{ETHERNET, HEADER, feature};

const NEEDS_CSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;

/// Why a frame was dropped.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Not even a header, or a frame without its Ethernet header.
    #[error("frame without a whole header")]
    Short,
    /// A checksum that was not negotiated, or lies outside the frame.
    #[error("checksum not negotiated or outside the frame")]
    Checksum,
    /// Segmentation that was not negotiated, or without a size or a checksum.
    #[error("segmentation not negotiated or without its values")]
    Segments,
}

/// Checks what the driver wrote against `features`, and clears what a driver has no business to set.
pub fn check(bytes: &mut [u8], features: u64) -> Result<(), HeaderError> {
    let frame = bytes.len().checked_sub(HEADER);
    let frame = frame.filter(|frame| *frame >= ETHERNET);
    let frame = frame.ok_or(HeaderError::Short)?;
    let (header, _) = bytes
        .split_first_chunk_mut::<HEADER>()
        .ok_or(HeaderError::Short)?;
    let [flags, gso, fields @ ..] = header;
    let [
        len_low,
        len_high,
        size_low,
        size_high,
        start_low,
        start_high,
        offset_low,
        offset_high,
        buffers @ ..,
    ] = fields;
    let number = |low: &u8, high: &u8| u16::from_le_bytes([*low, *high]);
    *flags &= NEEDS_CSUM;
    *buffers = [0; 2];
    let checksum = *flags & NEEDS_CSUM != 0;
    if checksum {
        let start = usize::from(number(start_low, start_high));
        let end = start + usize::from(number(offset_low, offset_high)) + 2;
        if features & feature::CSUM == 0 || start < ETHERNET || end > frame {
            return Err(HeaderError::Checksum);
        }
    }
    let negotiated = match *gso {
        GSO_NONE => return Ok(()),
        GSO_TCPV4 => feature::HOST_TSO4,
        GSO_TCPV6 => feature::HOST_TSO6,
        _ => 0,
    };
    let fits = usize::from(number(len_low, len_high)) <= frame;
    if features & negotiated == 0 || !checksum || !fits || number(size_low, size_high) == 0 {
        return Err(HeaderError::Segments);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u64 = feature::CSUM | feature::HOST_TSO4 | feature::HOST_TSO6;

    fn frame(header: [u8; HEADER], len: usize) -> Vec<u8> {
        let mut bytes = header.to_vec();
        bytes.resize(HEADER + len, 0);
        bytes
    }

    #[test]
    fn what_linux_sends_passes() {
        for header in [
            [0; HEADER],
            [1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0],
            [1, 1, 66, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0],
            [1, 4, 86, 0, 0x94, 5, 54, 0, 16, 0, 0, 0],
        ] {
            assert_eq!(check(&mut frame(header, 2000), ALL), Ok(()), "{header:?}");
        }
    }

    #[test]
    fn what_a_driver_has_no_business_to_set_is_cleared() {
        let mut bytes = frame([0xfe, 0, 9, 9, 9, 9, 9, 9, 9, 9, 7, 7], 60);
        check(&mut bytes, ALL).unwrap();
        assert_eq!((bytes[0], &bytes[10..12]), (0, &[0, 0][..]));
    }

    #[test]
    fn nonsense_is_refused() {
        use HeaderError::*;
        let cases: [([u8; HEADER], usize, u64, HeaderError); 14] = [
            ([0; 12], 13, ALL, Short),
            ([0; 12], 0, ALL, Short),
            // Checksum: not negotiated, at the frame's end and beyond, in the Ethernet header.
            ([1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0], 100, 0, Checksum),
            ([1, 0, 0, 0, 0, 0, 34, 0, 65, 0, 0, 0], 100, ALL, Checksum),
            (
                [1, 0, 0, 0, 0, 0, 34, 0, 0xff, 0xff, 0, 0],
                100,
                ALL,
                Checksum,
            ),
            (
                [1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0],
                65535,
                ALL,
                Checksum,
            ),
            ([1, 0, 0, 0, 0, 0, 13, 0, 0, 0, 0, 0], 100, ALL, Checksum),
            // Segments: not negotiated, of UDP, unknown, with ECN, without checksum or size, header beyond the frame.
            (
                [1, 1, 54, 0, 100, 0, 34, 0, 16, 0, 0, 0],
                200,
                feature::CSUM | feature::HOST_TSO6,
                Segments,
            ),
            (
                [1, 3, 54, 0, 100, 0, 34, 0, 16, 0, 0, 0],
                200,
                ALL,
                Segments,
            ),
            (
                [1, 5, 54, 0, 100, 0, 34, 0, 16, 0, 0, 0],
                200,
                ALL,
                Segments,
            ),
            (
                [1, 0xff, 54, 0, 100, 0, 34, 0, 16, 0, 0, 0],
                200,
                ALL,
                Segments,
            ),
            (
                [0, 1, 54, 0, 100, 0, 34, 0, 16, 0, 0, 0],
                200,
                ALL,
                Segments,
            ),
            ([1, 1, 54, 0, 0, 0, 34, 0, 16, 0, 0, 0], 200, ALL, Segments),
            (
                [1, 1, 201, 0, 100, 0, 34, 0, 16, 0, 0, 0],
                200,
                ALL,
                Segments,
            ),
        ];
        for (header, len, features, error) in cases {
            let mut bytes = frame(header, len);
            assert_eq!(check(&mut bytes, features), Err(error), "{header:?} {len}");
        }
        for len in 0..HEADER {
            assert_eq!(check(&mut vec![0; len], ALL), Err(Short));
        }
    }
}
