//! The calls of one connection: checks that Hello and Configure came first, and passes on to what does the work.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, stream};
use hutch_guest::{limits, pb};
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Notify, Semaphore};
use tonic::{Request, Response, Status, Streaming};

use crate::agent::Agent;
use crate::dial;
use crate::files;
use crate::process::output::{Event, Reader};
use crate::process::ring;
use crate::process::{Process, exit_status};
use crate::status;

/// Bytes of an error's text; it travels in a header, where a byte may take three.
const TEXT: usize = 2048;
/// Time for a new connection to say Hello.
const PATIENCE: Duration = Duration::from_secs(10);
/// Signals that the kernel has.
const SIGNALS: std::ops::RangeInclusive<i32> = 1..=64;
/// End-of-file as a terminal's reader types it.
const END_OF_TRANSMISSION: u8 = 4;

type Reply<T> = Result<Response<T>, Status>;

/// One connection of the host.
pub struct Connection {
    agent: Arc<Agent>,
    greeted: AtomicBool,
    /// A newer connection has said Hello.
    over: Arc<Notify>,
    /// No further calls, those in flight may end.
    close: Notify,
    /// Places for connections into the machine.
    dials: Arc<Semaphore>,
}

impl Connection {
    /// A connection that has not said anything yet.
    pub fn new(agent: Arc<Agent>) -> Arc<Self> {
        Arc::new(Self {
            agent,
            greeted: AtomicBool::new(false),
            over: Arc::new(Notify::new()),
            close: Notify::new(),
            dials: Arc::new(Semaphore::new(limits::DIALS as usize)),
        })
    }

    /// Answers calls until the host goes away or says Hello elsewhere.
    pub async fn serve(self: Arc<Self>, io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) {
        let serving = hutch_guest::serve::serve(io, self.clone(), self.close.notified());
        tokio::select! {
            // How a connection ended is the host's to know; here it changes nothing.
            _ = serving => {}
            () = self.over.notified() => {}
            () = self.silent() => {}
        }
    }

    /// Resolves when Hello has not come in time: places for connections are few.
    async fn silent(&self) {
        tokio::time::sleep(PATIENCE).await;
        if self.greeted.load(Ordering::Relaxed) {
            std::future::pending().await
        }
    }

    fn greeted(&self) -> Result<&Arc<Agent>, Status> {
        if self.greeted.load(Ordering::Relaxed) {
            return Ok(&self.agent);
        }
        Err(Status::failed_precondition("say Hello first"))
    }

    fn configured(&self) -> Result<&Arc<Agent>, Status> {
        let agent = self.greeted()?;
        if agent.is_configured() {
            return Ok(agent);
        }
        Err(Status::failed_precondition(
            "not configured: call Configure first",
        ))
    }

    fn process(&self, id: &str) -> Result<Arc<Process>, Status> {
        self.configured()?.table.get(id)
    }

    fn path(&self, path: &str) -> Result<std::path::PathBuf, Status> {
        files::path(&self.configured()?.base(), path)
    }
}

/// Wraps a result; cuts an error's text to what a header can hold.
fn answer<T>(result: Result<T, Status>) -> Reply<T> {
    match result {
        Ok(reply) => Ok(Response::new(reply)),
        Err(status) if status.message().len() > TEXT => {
            let mut end = TEXT;
            while !status.message().is_char_boundary(end) {
                end -= 1;
            }
            Err(Status::new(status.code(), &status.message()[..end]))
        }
        Err(status) => Err(status),
    }
}

#[tonic::async_trait]
impl pb::agent_server::Agent for Connection {
    type AttachStream = Pin<Box<dyn Stream<Item = Result<pb::OutputEvent, Status>> + Send>>;
    type DialStream = dial::Replies;
    type ReadFileStream = Pin<Box<dyn Stream<Item = Result<pb::FileData, Status>> + Send>>;

    async fn hello(&self, _: Request<pb::HelloRequest>) -> Reply<pb::HelloReply> {
        let reply = self.agent.hello(self.over.clone());
        self.greeted.store(true, Ordering::Relaxed);
        Ok(Response::new(reply))
    }

    async fn configure(&self, request: Request<pb::ConfigureRequest>) -> Reply<pb::ConfigureReply> {
        let unapplied = self.greeted()?.configure(request.into_inner()).await;
        answer(unapplied.map(|unapplied| pb::ConfigureReply { unapplied }))
    }

    async fn quiesce(&self, _: Request<pb::QuiesceRequest>) -> Reply<pb::QuiesceReply> {
        let agent = self.greeted()?.clone();
        // To its end, also when the host goes away meanwhile: nobody would thaw what is half frozen.
        let freezing = tokio::spawn(async move { agent.quiesce().await });
        let frozen = freezing
            .await
            .unwrap_or_else(|error| Err(Status::internal(error.to_string())));
        if frozen.is_ok() {
            // The snapshot shall hold no open session.
            self.close.notify_one();
        }
        answer(frozen.map(|()| pb::QuiesceReply {}))
    }

    async fn thaw(&self, request: Request<pb::ThawRequest>) -> Reply<pb::ThawReply> {
        let agent = self.greeted()?;
        agent.catch_up(request.into_inner().clock_unix_ms).await;
        let thawed = agent.thaw().await;
        answer(thawed.map(|()| pb::ThawReply {}))
    }

    async fn shutdown(&self, request: Request<pb::ShutdownRequest>) -> Reply<pb::ShutdownReply> {
        let agent = self.greeted()?;
        let request = request.into_inner();
        let reboot = match request.mode() {
            pb::shutdown_request::Mode::PowerOff => false,
            pb::shutdown_request::Mode::Reboot => true,
        };
        agent.end(reboot, Duration::from_millis(request.grace_ms.into()));
        answer(Ok(pb::ShutdownReply {}))
    }

    async fn start(&self, request: Request<pb::StartRequest>) -> Reply<pb::StartReply> {
        let agent = self.configured()?;
        let started = agent
            .table
            .start(request.into_inner(), agent.defaults())
            .await;
        answer(started.map(|process| pb::StartReply {
            pid: process.pid.as_raw_nonzero().get().unsigned_abs(),
        }))
    }

    async fn attach(&self, request: Request<pb::AttachRequest>) -> Reply<Self::AttachStream> {
        let request = request.into_inner();
        let process = self.process(&request.process_id)?;
        let reader = Reader::attach(process.output.clone(), request.from, !request.no_follow);
        let reader = reader
            .map_err(|end| Status::out_of_range(format!("only {end} bytes have been written")))?;
        let events = stream::unfold(reader, |mut reader| async {
            let event = reader.next(limits::CHUNK).await?;
            Some((Ok(output_event(event)), reader))
        });
        answer(Ok(Box::pin(events)))
    }

    async fn input(&self, request: Request<Streaming<pb::InputChunk>>) -> Reply<pb::InputReply> {
        let mut stream = request.into_inner();
        let Some(first) = stream.message().await? else {
            return Err(Status::invalid_argument("no process is named"));
        };
        let process = self.process(&first.process_id)?;
        answer(feed(&process, first, stream).await)
    }

    async fn wait(&self, request: Request<pb::WaitRequest>) -> Reply<pb::ExitStatus> {
        let process = self.process(&request.into_inner().process_id)?;
        answer(Ok(exit_status(process.output.wait().await)))
    }

    async fn signal(&self, request: Request<pb::SignalRequest>) -> Reply<pb::SignalReply> {
        let request = request.into_inner();
        let process = self.process(&request.process_id)?;
        if !SIGNALS.contains(&request.signal) {
            return Err(Status::invalid_argument("signals are 1 to 64"));
        }
        let sent = match request.all {
            true => {
                process.signal_all(request.signal);
                Ok(())
            }
            false => process.signal(request.signal),
        };
        answer(sent.map(|()| pb::SignalReply {}))
    }

    async fn resize(&self, request: Request<pb::ResizeRequest>) -> Reply<pb::ResizeReply> {
        let request = request.into_inner();
        let process = self.process(&request.process_id)?;
        let size = request
            .size
            .ok_or_else(|| Status::invalid_argument("no size is given"))?;
        answer(process.resize(size).map(|()| pb::ResizeReply {}))
    }

    async fn list_processes(
        &self,
        _: Request<pb::ListProcessesRequest>,
    ) -> Reply<pb::ListProcessesReply> {
        let processes = self.configured()?.table.list();
        answer(Ok(pb::ListProcessesReply { processes }))
    }

    async fn forget(&self, request: Request<pb::ForgetRequest>) -> Reply<pb::ForgetReply> {
        let id = request.into_inner().process_id;
        let forgotten = self.configured()?.table.forget(&id).await;
        answer(forgotten.map(|()| pb::ForgetReply {}))
    }

    async fn read_file(
        &self,
        request: Request<pb::ReadFileRequest>,
    ) -> Reply<Self::ReadFileStream> {
        let request = request.into_inner();
        let path = self.path(&request.path)?;
        let open = move || files::read::Reading::open(path, request.offset, request.length);
        let reading = files::blocking(open).await;
        answer(reading.map(|reading| Box::pin(reading.stream()) as Self::ReadFileStream))
    }

    async fn write_file(
        &self,
        request: Request<Streaming<pb::WriteFileChunk>>,
    ) -> Reply<pb::WriteFileReply> {
        let mut stream = request.into_inner();
        let first = stream.message().await?.and_then(|message| message.part);
        let Some(pb::write_file_chunk::Part::Open(open)) = first else {
            return Err(Status::invalid_argument("the first message must be open"));
        };
        let path = self.path(&open.path)?;
        let received = files::write::receive(path, open, stream).await;
        answer(received.map(|size| pb::WriteFileReply { size }))
    }

    async fn stat(&self, request: Request<pb::StatRequest>) -> Reply<pb::FileInfo> {
        let request = request.into_inner();
        let path = self.path(&request.path)?;
        answer(files::blocking(move || files::stat(&path, request.follow)).await)
    }

    async fn list_dir(&self, request: Request<pb::ListDirRequest>) -> Reply<pb::ListDirReply> {
        let request = request.into_inner();
        let path = self.path(&request.path)?;
        let list = move || files::list(&path, &request.after, request.limit);
        answer(files::blocking(list).await)
    }

    async fn remove(&self, request: Request<pb::RemoveRequest>) -> Reply<pb::RemoveReply> {
        let request = request.into_inner();
        let path = self.path(&request.path)?;
        let remove = move || files::remove::remove(&path, request.recursive);
        answer(files::blocking(remove).await.map(|()| pb::RemoveReply {}))
    }

    async fn make_dir(&self, request: Request<pb::MakeDirRequest>) -> Reply<pb::MakeDirReply> {
        let request = request.into_inner();
        let path = self.path(&request.path)?;
        let make = move || files::make_dir(&path, request.mode, request.parents);
        answer(files::blocking(make).await.map(|()| pb::MakeDirReply {}))
    }

    async fn r#move(&self, request: Request<pb::MoveRequest>) -> Reply<pb::MoveReply> {
        let request = request.into_inner();
        let (from, to) = (self.path(&request.from)?, self.path(&request.to)?);
        let rename = move || files::change::rename(&from, &to, request.keep_existing);
        answer(files::blocking(rename).await.map(|()| pb::MoveReply {}))
    }

    async fn change(&self, request: Request<pb::ChangeRequest>) -> Reply<pb::ChangeReply> {
        let request = request.into_inner();
        let path = self.path(&request.path)?;
        let change = move || files::change::change(&path, &request);
        answer(files::blocking(change).await.map(|()| pb::ChangeReply {}))
    }

    async fn walk(&self, request: Request<pb::WalkRequest>) -> Reply<pb::WalkReply> {
        let request = request.into_inner();
        let path = self.path(&request.path)?;
        answer(files::blocking(move || files::walk::page(&path, &request)).await)
    }

    async fn dial(&self, request: Request<Streaming<pb::DialRequest>>) -> Reply<Self::DialStream> {
        self.configured()?;
        let place = self.dials.clone().try_acquire_owned();
        let place = place.map_err(|_| {
            Status::resource_exhausted(format!("{} connections are open already", limits::DIALS))
        })?;
        let mut requests = request.into_inner();
        let first = requests.message().await?.and_then(|message| message.part);
        let Some(pb::dial_request::Part::Open(open)) = first else {
            return Err(Status::invalid_argument("the first message must be open"));
        };
        answer(dial::dial(&open, requests, place).await)
    }
}

fn output_event(event: Event) -> pb::OutputEvent {
    use pb::output_chunk::Stream;
    use pb::output_event::Event as Said;
    let event = match event {
        Event::Dropped(bytes) => Said::Dropped(bytes),
        Event::Exit(exit) => Said::Exit(exit_status(exit)),
        Event::Chunk(piece) => Said::Chunk(pb::OutputChunk {
            stream: match piece.stream {
                ring::Stream::Stdout => Stream::Stdout.into(),
                ring::Stream::Stderr => Stream::Stderr.into(),
            },
            sequence: piece.sequence,
            data: piece.data,
        }),
    };
    pb::OutputEvent { event: Some(event) }
}

/// Feeds standard input until its end, the stream's end, or that of the process.
async fn feed(
    process: &Process,
    first: pb::InputChunk,
    mut stream: Streaming<pb::InputChunk>,
) -> Result<pb::InputReply, Status> {
    // One call at a time. The one of a lost connection ends with it.
    let mut input = process.input.lock().await;
    let mut accepted = 0;
    let mut next = Some(first);
    while let Some(chunk) = next {
        if !chunk.process_id.is_empty() && chunk.process_id != process.id {
            return Err(Status::invalid_argument("one call feeds one process"));
        }
        let Some(pipe) = input.as_ref() else {
            if process.output.exit().is_some() || accepted > 0 {
                break;
            }
            return Err(Status::failed_precondition("standard input is closed"));
        };
        let sent = chunk.data.len() as u64;
        let taken = tokio::select! {
            taken = write_all(pipe, &chunk.data) => taken?,
            _ = process.output.wait() => break,
        };
        accepted += taken;
        if taken < sent {
            *input = None;
            break;
        }
        if chunk.eof {
            if process.has_terminal() {
                write_all(pipe, &Bytes::from_static(&[END_OF_TRANSMISSION])).await?;
            } else {
                *input = None;
            }
            break;
        }
        next = tokio::select! {
            message = stream.message() => message?,
            _ = process.output.wait() => None,
        };
    }
    Ok(pb::InputReply { accepted })
}

/// Writes as much as the process takes; fewer bytes than given mean that it has closed its end.
async fn write_all(pipe: &AsyncFd<std::os::fd::OwnedFd>, data: &Bytes) -> Result<u64, Status> {
    let mut written = 0;
    while written < data.len() {
        let ready = pipe.writable().await;
        let mut ready = ready.map_err(|error| status::of_io("write to the process", &error))?;
        let rest = &data[written..];
        match ready.try_io(|fd| Ok(rustix::io::write(fd.get_ref(), rest)?)) {
            Ok(Ok(length)) => written += length,
            Ok(Err(error)) => match Errno::from_io_error(&error) {
                Some(Errno::INTR) => {}
                Some(Errno::PIPE | Errno::IO) => break,
                _ => return Err(status::of_io("write to the process", &error)),
            },
            Err(_would_block) => {}
        }
    }
    Ok(written as u64)
}
