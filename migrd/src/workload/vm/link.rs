//! What a VMM child understands and says.

use migr_proto::v1::{self as proto, child_message, child_reply, child_request};

use super::child::{ChildError, ChildState};
use crate::child::frame::{self, FrameError};
use crate::workload::link::{self, Dialect, Heard, LinkError};

/// A connection to a VMM child.
pub type Link = link::Link<Vmm>;

/// The dialect of VMM children.
#[derive(Debug)]
pub struct Vmm;

impl Dialect for Vmm {
    type Request = child_request::Request;
    type Reply = child_reply::Reply;
    type Message = proto::ChildMessage;
    type State = ChildState;

    fn frame(id: u64, request: Self::Request, out: &mut Vec<u8>) -> Result<(), FrameError> {
        frame::encode(&proto::ChildRequest { id, request: Some(request) }, out)
    }

    fn hear(message: Self::Message, _: &Self::State) -> Option<Heard<Self>> {
        match message.message? {
            child_message::Message::Reply(proto::ChildReply { id, reply }) => Some(Heard::Reply(
                id,
                match reply? {
                    child_reply::Reply::Error(message) => Err(message),
                    reply => Ok(reply),
                },
            )),
            child_message::Message::StateChanged(status) => {
                Some(Heard::State(ChildState::from_wire(status)))
            }
            child_message::Message::CannotStart(reason) => Some(Heard::State(Self::dead(reason))),
        }
    }

    fn dead(why: String) -> Self::State {
        ChildState::Dead(why)
    }

    fn why_dead(state: &Self::State) -> Option<&str> {
        match state {
            ChildState::Dead(why) => Some(why),
            _ => None,
        }
    }
}

impl From<LinkError> for ChildError {
    fn from(error: LinkError) -> Self {
        match error {
            LinkError::Dead(why) => Self::Dead(why),
            LinkError::Refused(message) => Self::Refused(message),
            LinkError::Protocol(message) => Self::Protocol(message),
        }
    }
}

#[cfg(test)]
mod tests;
