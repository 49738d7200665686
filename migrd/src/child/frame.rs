//! Frames on the socket between daemon and child: a length (u32, little
//! endian) and a message. Both sides check the length before they believe it.

use prost::Message;

/// The longest message: the dirty bitmaps of a guest with 1 TiB, twice over.
pub const FRAME_BYTES: usize = 64 << 20;

/// The other side sent what no message can be.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// Longer than any message.
    #[error("a message of {0} bytes on the control socket: at most {FRAME_BYTES} are allowed")]
    TooLong(usize),
    /// Not a message.
    #[error("not a message on the control socket")]
    Malformed(#[from] prost::DecodeError),
}

/// Appends `message` as a frame to `out`.
///
/// # Errors
/// When it is too long.
pub fn encode(message: &impl Message, out: &mut Vec<u8>) -> Result<(), FrameError> {
    let length = message.encoded_len();
    let header = u32::try_from(length).ok().filter(|_| length <= FRAME_BYTES);
    let header = header.ok_or(FrameError::TooLong(length))?;
    out.reserve(4 + length);
    out.extend_from_slice(&header.to_le_bytes());
    message.encode(out).expect("a Vec has room");
    Ok(())
}

/// How long the first frame in `bytes` is with its header, once enough of it
/// came to tell.
///
/// # Errors
/// When it is too long.
pub fn length(bytes: &[u8]) -> Result<Option<usize>, FrameError> {
    let Some(header) = bytes.first_chunk::<4>() else { return Ok(None) };
    let length = usize::try_from(u32::from_le_bytes(*header)).unwrap_or(usize::MAX);
    if length > FRAME_BYTES { Err(FrameError::TooLong(length)) } else { Ok(Some(4 + length)) }
}

/// Takes the first whole frame off `bytes`.
///
/// # Errors
/// When it is too long or not a message.
pub fn decode<M: Message + Default>(bytes: &mut Vec<u8>) -> Result<Option<M>, FrameError> {
    match length(bytes)? {
        Some(whole) if bytes.len() >= whole => {
            let message = M::decode(&bytes[4..whole])?;
            bytes.drain(..whole);
            Ok(Some(message))
        }
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use migr_proto::v1::ChildRequest;

    use super::*;

    #[test]
    fn a_frame_is_taken_only_when_it_is_whole() {
        let message = ChildRequest { id: 7, request: None };
        let mut bytes = Vec::new();
        encode(&message, &mut bytes).unwrap();
        let last = bytes.pop().unwrap();
        assert_eq!(decode::<ChildRequest>(&mut bytes).unwrap(), None);
        bytes.extend([last, 9]);
        assert_eq!(decode(&mut bytes).unwrap(), Some(message));
        assert_eq!(bytes, [9]);
    }

    #[test]
    fn a_frame_that_claims_too_much_is_refused() {
        let mut bytes = u32::MAX.to_le_bytes().to_vec();
        assert!(matches!(decode::<ChildRequest>(&mut bytes), Err(FrameError::TooLong(_))));
    }
}
