//! A double of an agent for tests: honest in a small way, or misbehaving by script. It touches nothing of the system.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use bytes::{Bytes, BytesMut};
use futures::stream::{self, BoxStream, StreamExt};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixListener;
use tokio::sync::Notify;
use tonic::{Request, Response, Status, Streaming};

use crate::link::frame::{self, Found, Kind};
use crate::pb::agent_server::{Agent, AgentServer};
use crate::serve::serve_any;
use crate::{limits, pb};

/// What a [`Double`] does. All but the honest one differ from it in one thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Behaviour {
    /// Any process writes `out` and `err` and exits with 3, but the one called `endless` writes for ever and the one
    /// called `quiet` never ends. A file `/zeros/N` has N zeros. The directory has the entries `a` and `b`. A connection
    /// to port 7 echoes, to 19 sends for ever, to any other says that nothing listens.
    Honest,
    /// Hello: generation 1, which has no Dial and nothing after it.
    GenerationOne,
    /// Takes everything, says nothing.
    Silent,
    /// Does not even read.
    Deaf,
    /// Sends bytes that mean nothing, for ever.
    Garbage,
    /// Closes the stream at once.
    HangsUp,
    /// On a line with the link layer: answers every SYN with a wrong nonce.
    WrongAck,
    /// Hello: generation 0.
    GenerationZero,
    /// Hello: a boot nonce of half a MiB.
    HugeNonce,
    /// Hello: text with control characters.
    RawText,
    /// Says Hello, then never answers.
    Mute,
    /// Closes the connection in the middle of any call about processes or files.
    HangsUpInCall,
    /// Panics in any call about processes or files.
    Panics,
    /// Output skips sequence numbers.
    OutputGap,
    /// Output ends without an exit.
    NoExit,
    /// Replies are larger than the limit.
    HugeReplies,
    /// Exit code 2^31 − 1, process id 0.
    ImpossibleNumbers,
    /// Sends more of a file than it declared.
    LongFile,
    /// Declares 10 EiB and sends little.
    ShortFile,
    /// Sends a file without saying what it is.
    NamelessFile,
    /// Takes an upload's first message and no more.
    StallsUpload,
    /// Confirms more bytes of an upload than came.
    MiscountsUpload,
    /// Every page of a directory is the same, and there is always more.
    EndlessDirectory,
    /// Every page of a walk ends where it began.
    EndlessWalk,
    /// File names with slashes, and paths that lead upwards.
    PathsAsNames,
    /// Refuses with a text full of control characters.
    RudeRefusal,
    /// A connection brings data before it stands.
    DialsEarly,
    /// A connection that stands, then neither takes nor gives anything.
    DialsDeaf,
    /// A connection ends without an end.
    DialsNoEnd,
    /// A connection brings empty data.
    DialsEmpty,
    /// A connection stands twice.
    DialsTwice,
}

/// Serves one stream with a new [`Double`] until the stream ends.
pub async fn serve(io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static, behaviour: Behaviour) {
    Arc::new(Double::new(behaviour)).serve(io).await;
}

/// Serves every connection of a listener until dropped.
pub async fn listen(listener: UnixListener, behaviour: Behaviour) {
    let mut connections = tokio::task::JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        connections.spawn(serve(stream, behaviour));
    }
}

/// The double itself, for tests that look at what reached it.
#[derive(Debug)]
pub struct Double {
    behaviour: Behaviour,
    hang_up: Notify,
    written: Mutex<BTreeMap<String, Bytes>>,
    /// Told when an upload broke off.
    pub broken_upload: Notify,
}

type Reply<T> = Result<Response<T>, Status>;

impl Double {
    /// One that does what `behaviour` says.
    #[must_use]
    pub fn new(behaviour: Behaviour) -> Self {
        let (hang_up, broken_upload) = (Notify::new(), Notify::new());
        Self {
            behaviour,
            hang_up,
            written: Mutex::default(),
            broken_upload,
        }
    }

    /// Contents of the files that were written to the end, by path.
    pub fn written(&self) -> BTreeMap<String, Bytes> {
        self.written
            .lock()
            .expect("nothing panics while holding it")
            .clone()
    }

    /// Serves one stream until it ends.
    pub async fn serve(
        self: Arc<Self>,
        mut io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    ) {
        match self.behaviour {
            Behaviour::HangsUp => {}
            Behaviour::Deaf => std::future::pending().await,
            Behaviour::Silent => {
                let _ended = tokio::io::copy(&mut io, &mut tokio::io::sink()).await;
            }
            Behaviour::Garbage => {
                let garbage: Vec<u8> = (0..4096_u32).map(|n| (n * 7 % 251) as u8).collect();
                while io.write_all(&garbage).await.is_ok() {}
            }
            Behaviour::WrongAck => wrong_acks(io).await,
            _ => {
                let served = serve_any(
                    io,
                    AgentServer::from_arc(self.clone()),
                    std::future::pending(),
                );
                tokio::select! {
                    _ended = served => {}
                    () = self.hang_up.notified() => {}
                }
            }
        }
    }

    /// What precedes every call about processes and files.
    async fn misbehave(&self) -> Result<(), Status> {
        match self.behaviour {
            Behaviour::Mute => std::future::pending().await,
            Behaviour::Panics => panic!("as the script wants"),
            Behaviour::HangsUpInCall => {
                self.hang_up.notify_one();
                std::future::pending().await
            }
            Behaviour::RudeRefusal => Err(Status::permission_denied(
                "\u{1b}]0;gone\u{7}\r\nfake log line ".repeat(50),
            )),
            _ => Ok(()),
        }
    }

    fn exit(&self) -> pb::ExitStatus {
        let code = if self.is(Behaviour::ImpossibleNumbers) {
            i32::MAX
        } else {
            3
        };
        let how = Some(pb::exit_status::How::Code(code));
        pb::ExitStatus {
            how,
            timed_out: false,
            output_end: 6,
        }
    }

    fn is(&self, behaviour: Behaviour) -> bool {
        self.behaviour == behaviour
    }

    fn output(&self) -> Vec<pb::output_event::Event> {
        use pb::output_event::Event;
        let chunk = |stream, sequence, data: &'static str| {
            Event::Chunk(pb::OutputChunk {
                stream,
                sequence,
                data: data.into(),
            })
        };
        match self.behaviour {
            Behaviour::OutputGap => vec![chunk(0, 0, "out"), chunk(1, 4, "err")],
            Behaviour::NoExit => vec![chunk(0, 0, "out")],
            Behaviour::HugeReplies => vec![Event::Chunk(pb::OutputChunk {
                data: vec![0; limits::STREAM_MESSAGE].into(),
                ..Default::default()
            })],
            _ => vec![
                chunk(0, 0, "out"),
                chunk(1, 3, "err"),
                Event::Exit(self.exit()),
            ],
        }
    }
}

async fn wrong_acks(mut io: impl AsyncRead + AsyncWrite + Unpin) {
    let mut decoder = frame::Decoder::default();
    while io
        .read_buf(decoder.buffer())
        .await
        .is_ok_and(|read| read > 0)
    {
        while let Some(found) = decoder.next_found() {
            let Found::Frame(syn) = found else { continue };
            let mut ack = BytesMut::new();
            frame::encode_handshake(&mut ack, Kind::Ack, syn.session, &[7; frame::NONCE]);
            if io.write_all(&ack).await.is_err() {
                return;
            }
        }
    }
}

fn endless_output() -> impl futures::Stream<Item = Result<pb::OutputEvent, Status>> {
    let data = Bytes::from(vec![b'y'; limits::CHUNK]);
    stream::iter(0_u64..).map(move |chunk| {
        let (sequence, data) = (chunk * data.len() as u64, data.clone());
        let chunk = pb::OutputChunk {
            stream: 0,
            sequence,
            data,
        };
        Ok(pb::OutputEvent {
            event: Some(pb::output_event::Event::Chunk(chunk)),
        })
    })
}

fn entry(name: &'static str, size: u64) -> pb::FileInfo {
    pb::FileInfo {
        name: name.into(),
        kind: 1,
        size,
        mode: 0o644,
        ..Default::default()
    }
}

#[tonic::async_trait]
impl Agent for Double {
    type AttachStream = BoxStream<'static, Result<pb::OutputEvent, Status>>;
    type DialStream = BoxStream<'static, Result<pb::DialReply, Status>>;
    type ReadFileStream = BoxStream<'static, Result<pb::FileData, Status>>;

    async fn hello(&self, _: Request<pb::HelloRequest>) -> Reply<pb::HelloReply> {
        let generation = match self.behaviour {
            Behaviour::GenerationZero => 0,
            Behaviour::GenerationOne => 1,
            _ => limits::GENERATION,
        };
        let nonce = if self.is(Behaviour::HugeNonce) {
            512 * 1024
        } else {
            16
        };
        let raw = self.is(Behaviour::RawText);
        Ok(Response::new(pb::HelloReply {
            generation,
            boot_nonce: vec![7; nonce].into(),
            agent_version: if raw { "\u{1b}[2J" } else { "double" }.into(),
            kernel_release: "6.1".into(),
            boot_id: "00000000-0000-0000-0000-000000000000".into(),
            ..Default::default()
        }))
    }

    async fn configure(&self, _: Request<pb::ConfigureRequest>) -> Reply<pb::ConfigureReply> {
        let row = |field: &str| pb::Unapplied {
            field: field.into(),
            reason: "a\ndouble".into(),
        };
        Ok(Response::new(pb::ConfigureReply {
            unapplied: vec![row("hostname")],
        }))
    }

    async fn quiesce(&self, _: Request<pb::QuiesceRequest>) -> Reply<pb::QuiesceReply> {
        Ok(Response::new(Default::default()))
    }

    async fn thaw(&self, _: Request<pb::ThawRequest>) -> Reply<pb::ThawReply> {
        Ok(Response::new(Default::default()))
    }

    async fn shutdown(&self, _: Request<pb::ShutdownRequest>) -> Reply<pb::ShutdownReply> {
        Ok(Response::new(Default::default()))
    }

    async fn start(&self, _: Request<pb::StartRequest>) -> Reply<pb::StartReply> {
        self.misbehave().await?;
        let pid = if self.is(Behaviour::ImpossibleNumbers) {
            0
        } else {
            42
        };
        Ok(Response::new(pb::StartReply { pid }))
    }

    async fn attach(&self, request: Request<pb::AttachRequest>) -> Reply<Self::AttachStream> {
        self.misbehave().await?;
        if request.get_ref().process_id == "endless" {
            return Ok(Response::new(endless_output().boxed()));
        }
        let events = self.output().into_iter();
        let events = events.map(|event| Ok(pb::OutputEvent { event: Some(event) }));
        Ok(Response::new(stream::iter(events).boxed()))
    }

    async fn input(&self, request: Request<Streaming<pb::InputChunk>>) -> Reply<pb::InputReply> {
        self.misbehave().await?;
        let mut chunks = request.into_inner();
        let mut accepted = u64::from(self.is(Behaviour::MiscountsUpload));
        while let Some(chunk) = chunks.message().await? {
            accepted += chunk.data.len() as u64;
        }
        Ok(Response::new(pb::InputReply { accepted }))
    }

    async fn wait(&self, request: Request<pb::WaitRequest>) -> Reply<pb::ExitStatus> {
        self.misbehave().await?;
        if request.get_ref().process_id == "quiet" {
            std::future::pending::<()>().await;
        }
        Ok(Response::new(self.exit()))
    }

    async fn signal(&self, _: Request<pb::SignalRequest>) -> Reply<pb::SignalReply> {
        self.misbehave().await?;
        Ok(Response::new(Default::default()))
    }

    async fn resize(&self, _: Request<pb::ResizeRequest>) -> Reply<pb::ResizeReply> {
        self.misbehave().await?;
        Ok(Response::new(Default::default()))
    }

    async fn list_processes(
        &self,
        _: Request<pb::ListProcessesRequest>,
    ) -> Reply<pb::ListProcessesReply> {
        self.misbehave().await?;
        let huge = self.is(Behaviour::HugeReplies);
        let mut row = pb::ProcessInfo {
            process_id: "p".into(),
            pid: 42,
            ..Default::default()
        };
        row.argv.push("x".repeat(if huge { 1000 } else { 1 }));
        row.exit = Some(self.exit());
        let processes = vec![row; if huge { 1100 } else { 1 }];
        Ok(Response::new(pb::ListProcessesReply { processes }))
    }

    async fn forget(&self, _: Request<pb::ForgetRequest>) -> Reply<pb::ForgetReply> {
        self.misbehave().await?;
        Ok(Response::new(Default::default()))
    }

    async fn read_file(
        &self,
        request: Request<pb::ReadFileRequest>,
    ) -> Reply<Self::ReadFileStream> {
        self.misbehave().await?;
        let path = &request.get_ref().path;
        let size: u64 = path
            .strip_prefix("/zeros/")
            .and_then(|size| size.parse().ok())
            .ok_or_else(|| Status::not_found(path.clone()))?;
        let declared = match self.behaviour {
            Behaviour::LongFile => size / 2,
            Behaviour::ShortFile => 10 << 60,
            _ => size,
        };
        let info = (!self.is(Behaviour::NamelessFile)).then(|| entry("zeros", declared));
        let first = pb::FileData {
            info,
            ..Default::default()
        };
        let zeros = Bytes::from(vec![0; limits::CHUNK]);
        let data = stream::unfold(size, move |left| {
            let length = left.min(zeros.len() as u64);
            let data = zeros.slice(..length as usize);
            std::future::ready((length > 0).then(|| (data, left - length)))
        });
        let data = data.map(|data| pb::FileData { data, info: None });
        Ok(Response::new(
            stream::iter([first]).chain(data).map(Ok).boxed(),
        ))
    }

    async fn write_file(
        &self,
        request: Request<Streaming<pb::WriteFileChunk>>,
    ) -> Reply<pb::WriteFileReply> {
        use pb::write_file_chunk::Part;
        self.misbehave().await?;
        let mut chunks = request.into_inner();
        let Some(pb::WriteFileChunk {
            part: Some(Part::Open(open)),
        }) = chunks.message().await?
        else {
            return Err(Status::invalid_argument("no file is named"));
        };
        if self.is(Behaviour::StallsUpload) {
            std::future::pending::<()>().await;
        }
        let mut content = BytesMut::new();
        while let Some(chunk) = chunks
            .message()
            .await
            .inspect_err(|_| self.broken_upload.notify_one())?
        {
            if let Some(Part::Data(data)) = chunk.part {
                content.extend_from_slice(&data);
            }
        }
        let size = content.len() as u64 + u64::from(self.is(Behaviour::MiscountsUpload));
        let mut written = self
            .written
            .lock()
            .expect("nothing panics while holding it");
        written.insert(open.path, content.freeze());
        Ok(Response::new(pb::WriteFileReply { size }))
    }

    async fn stat(&self, request: Request<pb::StatRequest>) -> Reply<pb::FileInfo> {
        self.misbehave().await?;
        match &request.get_ref().path[..] {
            "/a" => Ok(Response::new(entry("a", 1))),
            path => Err(Status::not_found(path)),
        }
    }

    async fn list_dir(&self, request: Request<pb::ListDirRequest>) -> Reply<pb::ListDirReply> {
        self.misbehave().await?;
        let names = if self.is(Behaviour::PathsAsNames) {
            ["../a", "b/c"]
        } else {
            ["a", "b"]
        };
        let endless = self.is(Behaviour::EndlessDirectory);
        let after = &request.get_ref().after;
        let mut entries: Vec<_> = names.map(|name| entry(name, 1)).into();
        entries.retain(|entry| endless || entry.name > after);
        Ok(Response::new(pb::ListDirReply {
            entries,
            more: endless,
        }))
    }

    async fn remove(&self, _: Request<pb::RemoveRequest>) -> Reply<pb::RemoveReply> {
        self.misbehave().await?;
        Ok(Response::new(Default::default()))
    }

    async fn make_dir(&self, _: Request<pb::MakeDirRequest>) -> Reply<pb::MakeDirReply> {
        self.misbehave().await?;
        Ok(Response::new(Default::default()))
    }

    async fn r#move(&self, _: Request<pb::MoveRequest>) -> Reply<pb::MoveReply> {
        self.misbehave().await?;
        Ok(Response::new(Default::default()))
    }

    async fn change(&self, _: Request<pb::ChangeRequest>) -> Reply<pb::ChangeReply> {
        self.misbehave().await?;
        Ok(Response::new(Default::default()))
    }

    async fn walk(&self, request: Request<pb::WalkRequest>) -> Reply<pb::WalkReply> {
        self.misbehave().await?;
        let path = match self.behaviour {
            Behaviour::PathsAsNames => "../a",
            _ => "a",
        };
        let file = pb::FoundFile {
            path: path.into(),
            info: Some(entry("a", 1)),
        };
        let after = request.into_inner().after;
        let endless = self.is(Behaviour::EndlessWalk);
        let found = Vec::from_iter(Some(file).filter(|_| endless || after.is_empty()));
        let next = if endless { "a".into() } else { Bytes::new() };
        Ok(Response::new(pb::WalkReply { found, next }))
    }

    async fn dial(&self, request: Request<Streaming<pb::DialRequest>>) -> Reply<Self::DialStream> {
        use pb::{dial_reply::Part, dial_request};
        self.misbehave().await?;
        if self.is(Behaviour::GenerationOne) {
            return Err(Status::unimplemented("an old agent"));
        }
        let mut requests = request.into_inner();
        let Some(dial_request::Part::Open(open)) =
            requests.message().await?.and_then(|message| message.part)
        else {
            return Err(Status::invalid_argument("no port is named"));
        };
        let reply = |part| Ok(pb::DialReply { part: Some(part) });
        let opened = reply(Part::Opened(pb::DialOpened {}));
        let data = move |length| reply(Part::Data(vec![b'y'; length].into()));
        let first = match (self.behaviour, open.port) {
            (Behaviour::DialsEarly, _) => vec![data(1)],
            (Behaviour::DialsNoEnd, _) => vec![opened, data(1)],
            (Behaviour::DialsEmpty, _) => vec![opened, data(0)],
            (Behaviour::DialsTwice, _) => vec![opened.clone(), opened],
            (Behaviour::HugeReplies, _) => vec![opened, data(limits::STREAM_MESSAGE)],
            (Behaviour::DialsDeaf, _) => {
                // Holds the call's other direction open too.
                let silence = stream::pending().inspect(move |()| {
                    let _held = &requests;
                });
                let silence = silence.map(|()| Err(Status::internal("never")));
                return Ok(Response::new(stream::iter([opened]).chain(silence).boxed()));
            }
            (_, 7) => return Ok(Response::new(echo(requests).boxed())),
            (_, 19) => {
                let endless = stream::repeat_with(move || data(limits::CHUNK));
                return Ok(Response::new(stream::iter([opened]).chain(endless).boxed()));
            }
            _ => vec![reply(Part::Failed(pb::DialFailed {
                reason: pb::dial_failed::Reason::Refused.into(),
                message: "connection\nrefused".into(),
            }))],
        };
        Ok(Response::new(stream::iter(first).boxed()))
    }
}

/// Answers with what it gets, and ends when that has ended.
fn echo(
    requests: Streaming<pb::DialRequest>,
) -> impl futures::Stream<Item = Result<pb::DialReply, Status>> {
    use pb::{dial_reply::Part, dial_request};
    let opened = pb::DialReply {
        part: Some(Part::Opened(pb::DialOpened {})),
    };
    let echoed = requests.map(|request| {
        let part = match request?.part {
            Some(dial_request::Part::Data(data)) => Part::Data(data),
            Some(dial_request::Part::End(_)) => Part::End(pb::DialEnd {}),
            _ => return Err(Status::invalid_argument("neither data nor an end")),
        };
        Ok(pb::DialReply { part: Some(part) })
    });
    stream::iter([Ok(opened)]).chain(echoed)
}
